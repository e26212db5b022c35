// Drives the unmodified reference client: one JSON command per line on stdin, one JSON event per line on stdout.
//
// A command is {"id": n, "op": "...", ...}. Commands run at the same time; each ends with one "result" or "error"
// event of its id. Every request a client sends to the node is also reported, as a "wire" event of its name, because
// the tests judge what was really sent and not what the client believes.
import { createInterface } from 'node:readline'
import { Challenge } from 'mppx'
import { createJsonChannelStore, Mppx, sessionLegacyManager, sessionManager, tempo } from 'mppx/client'
import { createClient, http } from 'viem'
import { privateKeyToAccount } from 'viem/accounts'
import { tempoDevnet } from 'viem/chains'

const clients = new Map()

function emit(event) {
  process.stdout.write(
    JSON.stringify(event, (_, value) => (typeof value === 'bigint' ? value.toString() : value)) + '\n',
  )
}

// The only thing put between client and node: it writes down what passes and changes nothing.
function recorder(name) {
  return async (input, init) => {
    const request = new Request(input instanceof Request ? input.clone() : input, { ...init, signal: undefined })
    const sent = {
      name,
      event: 'wire',
      method: request.method,
      url: request.url,
      authorization: request.headers.get('authorization'),
      session: request.headers.get('payment-session'),
      hasBody: request.body !== null,
    }
    try {
      const response = await globalThis.fetch(input, init)
      emit({ ...sent, status: response.status, receipt: response.headers.get('payment-receipt') })
      return response
    } catch (error) {
      emit({ ...sent, status: null, receipt: null, failure: String(error) })
      throw error
    }
  }
}

function make({ name, kind, key, rpc, chainId, store, ...options }) {
  const account = privateKeyToAccount(key)
  const chain = { ...tempoDevnet, id: chainId, rpcUrls: { default: { http: [rpc] } } }
  const client = createClient({ account, chain, pollingInterval: 50, transport: http(rpc) })
  const shared = { account, getClient: () => client, ...options }
  if (kind === 'legacy') {
    clients.set(name, sessionLegacyManager({ ...shared, fetch: recorder(name) }))
    return {}
  }
  if (store !== undefined) {
    const entries = new Map(Object.entries(store))
    shared.channelStore = createJsonChannelStore({
      get: (at) => entries.get(at),
      set: (at, value) => (entries.set(at, value), emit({ name, event: 'store', at, value })),
      delete: (at) => (entries.delete(at), emit({ name, event: 'store', at, value: null })),
    })
  }
  if (kind === 'manager') clients.set(name, sessionManager({ ...shared, fetch: recorder(name) }))
  else clients.set(name, Mppx.create({ polyfill: false, fetch: recorder(name), methods: [tempo.session(shared)] }))
  return {}
}

function post({ body, headers }) {
  return { method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body: JSON.stringify(body) }
}

function view(client) {
  return { channelId: client.channelId, cumulative: client.cumulative, opened: client.opened, state: client.state }
}

const operations = {
  make,

  async sse({ id, name, url, body, stopAfter }) {
    const client = clients.get(name)
    const abort = new AbortController()
    const options = {
      ...post({ body }),
      signal: abort.signal,
      onReceipt: (receipt) => emit({ id, event: 'receipt', receipt }),
    }
    let chunks = 0
    for await (const data of await client.sse(url, options)) {
      emit({ id, event: 'chunk', data })
      if (++chunks === stopAfter) abort.abort()
    }
    return { chunks, ...view(client) }
  },

  async fetch({ id, name, url, body, headers }) {
    const client = clients.get(name)
    const response = await client.fetch(url, post({ body, headers }))
    emit({ id, event: 'headers', status: response.status, headers: Object.fromEntries(response.headers) })
    const text = await response.text()
    return { status: response.status, headers: Object.fromEntries(response.headers), text, ...view(client) }
  },

  async close({ name }) {
    const client = clients.get(name)
    return { receipt: await client.close(), ...view(client) }
  },

  async topUp({ name, amount }) {
    const client = clients.get(name)
    return { receipt: await client.topUp(amount), ...view(client) }
  },

  // What the client's own parser makes of a 402.
  read({ headers, body }) {
    const response = new Response(body, { status: 402, headers })
    return { challenges: Challenge.fromResponseList(response) }
  },
}

async function perform(command) {
  try {
    const result = await operations[command.op](command)
    emit({ id: command.id, event: 'result', ...result })
  } catch (error) {
    emit({ id: command.id, event: 'error', message: String(error?.message ?? error), name: error?.name })
  }
}

emit({ event: 'ready' })
for await (const line of createInterface({ input: process.stdin })) void perform(JSON.parse(line))
process.exit(0)
