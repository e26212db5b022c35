"""What the node counts: one method for everything that happens, and one place where the numbers come from.

No method is called per token. A stream reports once, when it ends, and once per pause. A method never raises and never
waits: whatever a value is, the payment it is about goes on.

Reasons, endings and kinds are given as the text of their enumerations, wherever those live; a text that is none of a
metric's values is counted as ``other`` (``metric_labels.py``). Money is pico-dollars, time is seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import add
from pathlib import Path
from types import MappingProxyType
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mppnode.kernel.clock import Clock
from mppnode.observe import metric_catalog as catalog
from mppnode.observe.metric_cells import Board, Snapshot
from mppnode.observe.metric_families import ProcessFigures, empty_family, families
from mppnode.observe.metric_files import SharedFolder
from mppnode.observe.metric_labels import ChannelMoney, Ending, Outcome, Rail, TokenKind, Vocabulary

_OUTCOMES: Final[Mapping[str, Outcome]] = MappingProxyType(
    {
        Ending.COMPLETE: Outcome.SERVED,
        Ending.OVERRUN: Outcome.SERVED,
        Ending.UPSTREAM_FAILED: Outcome.FAILED,
        Ending.FAILED: Outcome.FAILED,
        Ending.NODE_STOPPED: Outcome.FAILED,
    }
)
_PROMPT, _CACHED, _COMPLETION, _REASONING = (kind.value for kind in TokenKind)


class Metrics(Collector):
    """The node's metrics, registered in a registry that is passed in. Count from the event loop's thread only."""

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        clock: Clock,
        vocabulary: Vocabulary,
        shared: SharedFolder | None = None,
    ) -> None:
        """``shared`` makes the registry show what all processes of the node have counted.

        Raises:
            ValueError: the vocabulary has room for so many names that the series could go beyond their budget.
        """
        if (most := catalog.series_max(vocabulary)) > catalog.SERIES_MAX:
            raise ValueError(f"{most} series are possible, and {catalog.SERIES_MAX} is the most")
        self._board = board = Board(vocabulary, clock.now_millis)
        self._shared = shared
        self._process = ProcessFigures()
        self._requests = board.counter(catalog.REQUESTS)
        self._requests_active = board.gauge(catalog.REQUESTS_ACTIVE)
        self._requests_refused = board.counter(catalog.REQUESTS_REFUSED)
        self._model_requests = board.counter(catalog.MODEL_REQUESTS)
        self._request_seconds = board.histogram(catalog.REQUEST_SECONDS)
        self._first_token = board.histogram(catalog.FIRST_TOKEN_SECONDS)
        self._token_gap = board.histogram(catalog.TOKEN_GAP_SECONDS)
        self._tokens = board.counter(catalog.TOKENS)
        self._counted = board.counter(catalog.COUNTED_REQUESTS)
        self._charged = board.counter(catalog.CHARGED_USD)
        self._model_charged = board.counter(catalog.MODEL_CHARGED_USD)
        self._provider_charged = board.counter(catalog.PROVIDER_CHARGED_USD)
        self._breaches = board.counter(catalog.CEILING_BREACHES)
        self._holds_refused = board.counter(catalog.HOLDS_REFUSED)
        self._streams_active = board.gauge(catalog.STREAMS_ACTIVE)
        self._streams_paused = board.gauge(catalog.STREAMS_PAUSED)
        self._pauses = board.counter(catalog.PAUSES)
        self._pause_seconds = board.histogram(catalog.PAUSE_SECONDS)
        self._stall_seconds = board.counter(catalog.STALL_SECONDS)
        self._disconnects = board.counter(catalog.DISCONNECTS)
        self._cancels = board.counter(catalog.UPSTREAM_CANCELS)
        self._decisions = board.counter(catalog.DECISIONS)
        self._exclusions = board.counter(catalog.EXCLUSIONS)
        self._attempts = board.histogram(catalog.REQUEST_ATTEMPTS)
        self._provider_attempts = board.counter(catalog.PROVIDER_ATTEMPTS)
        self._standing = board.gauge(catalog.PROVIDER_STANDING)
        self._model_providers = board.gauge(catalog.MODEL_PROVIDERS)
        self._price_time = board.gauge(catalog.PRICE_TIME)
        self._prices_held = board.gauge(catalog.PRICES_HELD)
        self._build_money(board)
        for rail in Rail:
            self._requests_active.put(0, rail.value)
            self._exposure.put(0, rail.value)
        self._streams_active.put(0)
        self._streams_paused.put(0)
        registry.register(self)

    @classmethod
    def unseen(cls, clock: Clock) -> Metrics:
        """Metrics nobody reads: for commands, and for parts that are used alone."""
        return cls(CollectorRegistry(), clock=clock, vocabulary=Vocabulary())

    def _build_money(self, board: Board) -> None:
        self._vouchers = board.counter(catalog.VOUCHERS)
        self._vouchers_refused = board.counter(catalog.VOUCHERS_REFUSED)
        self._voucher_seconds = board.histogram(catalog.VOUCHER_SECONDS)
        self._accepted = board.counter(catalog.ACCEPTED_USD)
        self._settled = board.counter(catalog.SETTLED_USD)
        self._transactions = board.counter(catalog.TRANSACTIONS)
        self._gas = board.counter(catalog.GAS_USD)
        self._opened = board.counter(catalog.CHANNELS_OPENED)
        self._channels = board.gauge(catalog.CHANNELS)
        self._channel_money = board.gauge(catalog.CHANNEL_USD)
        self._unsettled_age = board.gauge(catalog.UNSETTLED_AGE)
        self._close_requests = board.gauge(catalog.CLOSE_REQUESTS)
        self._close_request_age = board.gauge(catalog.CLOSE_REQUEST_AGE)
        self._exposure = board.gauge(catalog.EXPOSURE_USD)
        self._fee_payer = board.gauge(catalog.FEE_PAYER_USD)
        self._sponsor_used = board.gauge(catalog.SPONSOR_USED_USD)
        self._sponsor = board.gauge(catalog.SPONSOR_USD)
        self._differences = board.gauge(catalog.LEDGER_DIFFERENCES)
        self._drift = board.gauge(catalog.LEDGER_DRIFT_USD)
        self._reconciled = board.gauge(catalog.RECONCILED_TIME)
        self._chain_age = board.gauge(catalog.CHAIN_HEAD_AGE)
        self._keys = board.gauge(catalog.KEYS_ACTIVE)
        self._limits = board.counter(catalog.LIMITS_REACHED)
        self._credited = board.counter(catalog.CREDITED_USD)
        self._taken_back = board.counter(catalog.TAKEN_BACK_USD)
        self._unbilled = board.gauge(catalog.UNBILLED_USD)
        self._outbox = board.gauge(catalog.OUTBOX_TASKS)
        self._outbox_age = board.gauge(catalog.OUTBOX_AGE)
        self._outbox_attempts = board.counter(catalog.OUTBOX_ATTEMPTS)
        self._webhooks = board.counter(catalog.WEBHOOKS)
        self._webhooks_refused = board.counter(catalog.WEBHOOKS_REFUSED)
        self._stripe_calls = board.counter(catalog.STRIPE_CALLS)
        self._meter_errors = board.counter(catalog.METER_ERRORS)
        self._commit_seconds = board.histogram(catalog.COMMIT_SECONDS)
        self._store_failures = board.counter(catalog.STORE_FAILURES)
        self._loop_lag = board.histogram(catalog.LOOP_LAG_SECONDS)
        self._processes = board.gauge(catalog.PROCESSES)
        self._snapshot_failures = board.counter(catalog.SNAPSHOT_FAILURES)
        self._unreadable = board.gauge(catalog.SNAPSHOTS_UNREADABLE)
        self._cpu = board.counter(catalog.CPU_SECONDS)
        self._memory = board.gauge(catalog.MEMORY_BYTES)
        self._open_fds = board.gauge(catalog.OPEN_FDS)
        self._max_fds = board.gauge(catalog.MAX_FDS)
        self._start_time = board.gauge(catalog.START_TIME)

    # ----------------------------------------------------------------------------------------------------- requests

    def request_began(self, rail: str, *, stream: bool) -> None:
        """A paid request is being served; :meth:`request_ended` follows, whatever happens."""
        self._requests_active.move(1, rail)
        if stream:
            self._streams_active.move(1)

    def request_ended(
        self,
        rail: str,
        ending: str,
        *,
        stream: bool,
        model: str,
        provider: str | None,
        cost_pico: int = 0,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        reasoning_tokens: int = 0,
        source: str | None = None,
        attempts: int = 1,
        total_s: float = 0.0,
        first_s: float | None = None,
        gap_s: float | None = None,
        stalled_s: float = 0.0,
    ) -> None:
        """A paid request has ended.

        ``provider`` served it, or is None. ``source`` tells whose token count the bill is made of, if there is a bill.
        ``first_s`` is from the request to the first token, ``gap_s`` the mean time between two tokens after it, both
        None when there were none; only of a stream they are counted, as an answer in one piece takes its whole time.
        ``stalled_s`` was spent waiting for a client that did not read.
        """
        self._requests_active.move(-1, rail)
        if stream:
            self._streams_active.move(-1)
        self._requests.add(1, rail, ending)
        self._model_requests.add(1, model, _OUTCOMES.get(ending, Outcome.ABANDONED))
        self._request_seconds.see(total_s, rail)
        self._charged.add(cost_pico, rail)
        self._model_charged.add(cost_pico, model)
        tokens = self._tokens
        tokens.add(prompt_tokens, model, _PROMPT)
        tokens.add(completion_tokens, model, _COMPLETION)
        if cached_tokens:
            tokens.add(cached_tokens, model, _CACHED)
        if reasoning_tokens:
            tokens.add(reasoning_tokens, model, _REASONING)
        if source is not None:
            self._counted.add(1, source)
        if stalled_s:
            self._stall_seconds.add(stalled_s)
        if provider is not None:
            self._provider_charged.add(cost_pico, provider)
            self._attempts.see(attempts)
            if stream and first_s is not None:
                self._first_token.see(first_s, provider)
            if gap_s is not None:
                self._token_gap.see(gap_s, provider)

    def request_refused(self, reason: str) -> None:
        """A request was not served."""
        self._requests_refused.add(1, reason)

    def hold_refused(self, rail: str, reason: str) -> None:
        """A reservation was refused."""
        self._holds_refused.add(1, rail, reason)

    def ceiling_breached(self) -> None:
        """Somebody was charged more than they allowed: never, unless there is a defect."""
        self._breaches.add(1)

    # ------------------------------------------------------------------------------------------------------ streams

    def pause_began(self) -> None:
        """A stream waits for its payer; :meth:`pause` follows."""
        self._streams_paused.move(1)

    def pause(self, seconds: float, ended: str) -> None:
        """A stream waits no more: ``paid``, ``unpaid`` or ``gone``."""
        self._streams_paused.move(-1)
        self._pause_seconds.see(seconds)
        self._pauses.add(1, ended)

    def disconnected(self, phase: str) -> None:
        """A client went away."""
        self._disconnects.add(1, phase)

    def upstream_cancelled(self, provider: str) -> None:
        """A provider's answer was broken off by us."""
        self._cancels.add(1, provider)

    # ------------------------------------------------------------------------------------------------------ routing

    def routed(self, strategy: str, asked: str, excluded: Mapping[str, int]) -> None:
        """A route was decided; ``excluded`` counts by reason who was left out."""
        self._decisions.add(1, strategy, asked)
        self.left_out(excluded)

    def left_out(self, excluded: Mapping[str, int]) -> None:
        """Providers were not considered, by reason; also where nobody was left and no route could be decided."""
        for reason, count in excluded.items():
            self._exclusions.add(count, reason)

    def provider_attempt(self, provider: str, result: str) -> None:
        """A provider was called: ``ok``, or how it failed."""
        self._provider_attempts.add(1, provider, result)

    def breaker_states(self, standings: Mapping[str, int]) -> None:
        """What this process thinks of each provider there is, from 0 (steady) to 4 (avoided)."""
        self._standing.replace(standings, max)

    def providers_usable(self, counts: Mapping[str, int]) -> None:
        """How many providers could serve each model there is now; one that is sold no more is not missed for ever."""
        self._model_providers.replace(counts, min)

    def prices_confirmed(self, at_s: Mapping[str, int], held: Mapping[str, int]) -> None:
        """When each price list there is was read (Unix seconds), and how many of its prices wait for the operator."""
        self._price_time.replace(at_s, min)
        self._prices_held.replace({provider: held.get(provider, 0) for provider in at_s}, add)

    # ------------------------------------------------------------------------------------------------------ channels

    def voucher_accepted(self, delta_pico: int, seconds: float) -> None:
        """A voucher is durable; it raised what its channel pays by ``delta_pico``, and took ``seconds``."""
        self._vouchers.add(1)
        self._accepted.add(delta_pico)
        self._voucher_seconds.see(seconds)

    def voucher_refused(self, reason: str) -> None:
        """A voucher was refused."""
        self._vouchers_refused.add(1, reason)

    def channel_opened(self) -> None:
        """A payer's channel is open and known."""
        self._opened.add(1)

    def settled_on_chain(self, kind: str, paid_pico: int, gas_pico: int) -> None:
        """A settlement or close is final: the chain has paid out ``paid_pico``, and its gas cost ``gas_pico``."""
        self._transactions.add(1, kind, "confirmed")
        self._settled.add(paid_pico)
        self._gas.add(gas_pico, kind)

    def transaction_failed(self, kind: str, result: str, gas_pico: int = 0) -> None:
        """A transaction of ours is ``dead`` or ``reverted``."""
        self._transactions.add(1, kind, result)
        self._gas.add(gas_pico, kind)

    def gas_sponsored(self, gas_pico: int) -> None:
        """A payer's transaction was paid for."""
        self._gas.add(gas_pico, "sponsor")

    def channels(self, by_phase: Mapping[str, int]) -> None:
        """How many channels that are not closed are in each phase; phases that are not named have none."""
        for phase in catalog.CHANNELS.labels[0].values:
            self._channels.put(by_phase.get(phase, 0), phase)

    def channel_money(self, *, claimable_pico: int, earned_pico: int, headroom_pico: int, unsigned_pico: int) -> None:
        """Sums over the channels that are not closed; see ``ChannelMoney``."""
        self._channel_money.put(claimable_pico, ChannelMoney.CLAIMABLE)
        self._channel_money.put(earned_pico, ChannelMoney.EARNED)
        self._channel_money.put(headroom_pico, ChannelMoney.HEADROOM)
        self._channel_money.put(unsigned_pico, ChannelMoney.UNSIGNED)

    def relieved(self) -> None:
        """Another process looks after the channels now: what this one last saw of them is no news any more."""
        for gauge in (
            self._channels,
            self._channel_money,
            self._unsettled_age,
            self._close_requests,
            self._close_request_age,
            self._differences,
            self._drift,
        ):
            gauge.clear()

    def unsettled_age(self, seconds: float) -> None:
        """How long the oldest earned dollar has not been settled; 0 when all are."""
        self._unsettled_age.put(seconds)

    def close_requests(self, count: int, oldest_s: float) -> None:
        """Payers' requests to close that are not answered, and how long the oldest has waited."""
        self._close_requests.put(count)
        self._close_request_age.put(oldest_s)

    def exposure(self, rail: str, pico: int) -> None:
        """What this process has delivered and nothing covers yet."""
        self._exposure.put(pico, rail)

    def fee_payer_balance(self, pico: int) -> None:
        """What is left for gas."""
        self._fee_payer.put(pico)

    def sponsor_budget(self, used_pico: int, total_pico: int) -> None:
        """What was promised for payers' gas in the last hour, and the most that may be."""
        self._sponsor_used.put(used_pico)
        self._sponsor.put(total_pico)

    def reconciled(self, at_s: int, differences: int, drift_pico: int) -> None:
        """A whole reconciliation ended at ``at_s`` (Unix seconds)."""
        self._reconciled.put(at_s)
        self._differences.put(differences)
        self._drift.put(drift_pico)

    def chain_head_age(self, seconds: float) -> None:
        """How old the newest block of the chain endpoint is."""
        self._chain_age.put(seconds)

    # -------------------------------------------------------------------------------------------- accounts and billing

    def keys_active(self, count: int) -> None:
        """How many API keys may be used."""
        self._keys.put(count)

    def limit_reached(self, limit: str) -> None:
        """A request was refused for a limit or a spend cap of its key."""
        self._limits.add(1, limit)

    def credited(self, kind: str, pico: int) -> None:
        """Money was credited to an account."""
        self._credited.add(pico, kind)

    def taken_back(self, kind: str, pico: int) -> None:
        """Money was refunded, disputed or taken; ``pico`` is positive."""
        self._taken_back.add(pico, kind)

    def unbilled(self, pico: int) -> None:
        """Post-paid usage that Stripe has not been told of."""
        self._unbilled.put(pico)

    def outbox(self, kind: str, *, due: int, parked: int, oldest_s: float) -> None:
        """How many tasks of a kind are not done, and how long the oldest has been due."""
        self._outbox.put(due, kind, "due")
        self._outbox.put(parked, kind, "parked")
        self._outbox_age.put(oldest_s, kind)

    def outbox_attempt(self, kind: str, result: str) -> None:
        """A task was tried: ``done``, ``again`` or ``parked``."""
        self._outbox_attempts.add(1, kind, result)

    def webhook(self, kind: str) -> None:
        """A webhook was taken in."""
        self._webhooks.add(1, kind)

    def webhook_refused(self, reason: str) -> None:
        """A webhook was refused."""
        self._webhooks_refused.add(1, reason)

    def stripe_called(self, result: str) -> None:
        """A call to Stripe ended: ``ok``, or the kind of its fault."""
        self._stripe_calls.add(1, result)

    def meter_error(self, count: int = 1) -> None:
        """Stripe could not use so many reports of usage."""
        self._meter_errors.add(count)

    # ---------------------------------------------------------------------------------------------- store and process

    def committed(self, store: str, seconds: float) -> None:
        """A transaction of the ledger is durable."""
        self._commit_seconds.see(seconds, store)

    def commit_failed(self, store: str) -> None:
        """A transaction of the ledger failed."""
        self._store_failures.add(1, store)

    def loop_lag(self, seconds: float) -> None:
        """A timer ran so much too late."""
        self._loop_lag.see(seconds)

    # -------------------------------------------------------------------------------------------------------- reading

    def know(self, *, models: Iterable[str] = (), providers: Iterable[str] = ()) -> None:
        """Give names of a catalog that was read again series of their own, while there is room."""
        if self._board.vocabulary.know(models=models, providers=providers):
            self._board.foresee()

    def snapshot(self) -> Snapshot:
        """What this process alone has counted."""
        figures = self._process.read()
        for gauge, name in (
            (self._memory, catalog.MEMORY_BYTES.name),
            (self._open_fds, catalog.OPEN_FDS.name),
            (self._max_fds, catalog.MAX_FDS.name),
            (self._start_time, catalog.START_TIME.name),
        ):
            if name in figures:
                gauge.put(figures[name])
        self._cpu.put(figures.get(catalog.CPU_SECONDS.name, 0.0))
        self._processes.put(1)
        if self._shared is not None:
            self._snapshot_failures.put(self._shared.failures)
            self._unreadable.put(self._shared.unreadable)
        return self._board.snapshot()

    @property
    def shared(self) -> bool:
        """Whether other processes count with this one."""
        return self._shared is not None

    def share(self, folder: Path) -> None:
        """Count together with every process that shares ``folder``, from what its slot counted before.

        Raises:
            OSError: the folder cannot be used, or (``SlotsTaken``) too many processes use it.
        """
        assert self._shared is None
        self._shared = SharedFolder(folder, self._board.vocabulary)

    def flush(self) -> None:
        """Write this process's numbers for the others; every second or so, in a thread. Without others, nothing."""
        if self._shared is not None:
            self._shared.flush(self.snapshot)

    def close(self) -> None:
        """Leave the numbers to the others and give the slot away; the last thing a process does."""
        if self._shared is not None:
            self._shared.close(self.snapshot)

    def describe(self) -> Iterable[Metric]:
        """What :meth:`collect` may yield, for the registry to find two of one name."""
        return [empty_family(spec) for spec in catalog.CATALOG]

    def collect(self) -> Iterable[Metric]:
        """The node's metrics, of all its processes if they share a folder. May be called from any thread."""
        shared = self._shared
        found = self.snapshot() if shared is None else shared.exchange(self.snapshot)
        return families(found)
