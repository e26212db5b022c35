// Rebuilds TempoStreamChannel.json from the Solidity source:
//   MPPNODE_NODE_MODULES=<folder with solc installed> node tests/interop/anvil/build.mjs
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const here = dirname(fileURLToPath(import.meta.url))
const modules = process.env.MPPNODE_NODE_MODULES ?? join(here, '..', 'node_modules')
const solc = createRequire(join(modules, 'package.json'))('solc')

const name = 'TempoStreamChannel'
const settings = {
  optimizer: { enabled: true, runs: 200 },
  evmVersion: 'cancun',
  // no metadata: its hash would change with the compiler's input, and the artifact must be reproducible
  metadata: { bytecodeHash: 'none', appendCBOR: false },
  outputSelection: { '*': { '*': ['abi', 'evm.bytecode.object'] } },
}
const input = {
  language: 'Solidity',
  sources: { [`${name}.sol`]: { content: readFileSync(join(here, `${name}.sol`), 'utf8') } },
  settings,
}
const output = JSON.parse(solc.compile(JSON.stringify(input)))
const problems = (output.errors ?? []).map((entry) => entry.formattedMessage)
if (problems.length > 0) {
  console.error(problems.join('\n'))
  process.exit(1)
}
const { abi, evm } = output.contracts[`${name}.sol`][name]
const artifact = { contractName: name, compiler: solc.version(), bytecode: `0x${evm.bytecode.object}`, abi }
const target = join(here, `${name}.json`)
writeFileSync(target, `${JSON.stringify(artifact, null, 1)}\n`)
console.log(`wrote ${name}.json with ${solc.version()}`)
