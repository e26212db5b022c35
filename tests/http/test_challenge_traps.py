"""Traps of the challenge and the credential around it: T-01 to T-11e, P14 to P18, P33 and the strict readers of 2.0."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from channels.instants import UnixMillis, parse_rfc3339, to_rfc3339
from channels.wire import base64url, jcs
from channels.wire.challenge import ChallengeMac, encode_object
from channels.wire.credential import Credential, encode, payload_to_json
from channels.wire.headers import authorization
from tests.support.http_client import PATH, UNIT, V1, World, bent, chat, opened_json, sealed_json


def mac_of(world: World) -> ChallengeMac:
    """The node's own MAC: the only way to see what it does with a challenge it would never have issued."""
    return ChallengeMac((world.net.payee_key.hex().encode(),))


def decoded(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(base64url.decode(text, field="x", length_max=100_000))
    return value


async def refused(world: World, credential: str | None, body: object = None, **more: Any) -> str:
    """Send something that must be refused with a fresh challenge, no receipt and nothing changed; its reason."""
    before = await world.state()
    reply = await world.send(body, credential, **more)
    assert reply.status == 402, (reply.status, reply.body)
    assert reply.challenges, "every refusal carries a fresh challenge"
    assert "Payment-Receipt" not in reply.headers
    assert reply.headers["Cache-Control"] == "no-store"
    assert await world.state() == before
    return reply.code


async def test_t01_the_request_is_canonical_json(world: World) -> None:
    """T-01: the request text is canonical JSON, so a client that decodes and re-encodes it echoes the same text."""
    for challenge in (await world.send(chat())).challenges:
        members = decoded(challenge.request)
        assert encode_object(dict(reversed(members.items()))) == challenge.request
        assert base64url.decode(challenge.request, field="x", length_max=10_000).decode() == jcs.canonicalize(members)


async def test_t02_challenges_of_one_millisecond_differ_in_id_and_expiry_only(world: World) -> None:
    """T-02: twenty challenges in one instant have twenty ids, and differ in nothing else a client compares."""
    made = [(await world.send(chat())).challenge() for _ in range(20)]
    assert len({challenge.id for challenge in made}) == 20
    assert len({parse_rfc3339(challenge.expires) for challenge in made}) == 1, "the clock did not move"
    rest = {(c.realm, c.method, c.intent, c.request, c.opaque, c.description, c.digest, c.header) for c in made}
    assert len(rest) == 1


def flipped(text: str, at: int) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


@pytest.mark.parametrize("slot", ["id", "realm", "method", "intent", "request", "expires", "opaque"])
async def test_t03_p15_one_flipped_character_anywhere_is_found(world: World, slot: str) -> None:
    """T-03, P15: any character of any bound slot changed is an invalid challenge, before any chain call."""
    channel = world.payer.channel()
    credential = await world.pay(world.payer.open(channel))
    text = opened_json(credential)["challenge"][slot]
    for at in range(0, len(text), max(1, len(text) // 12)):
        assert await refused(world, bent(credential, f"challenge.{slot}", flipped(text, at))) == "invalid_challenge"


@pytest.mark.parametrize(("slot", "value"), [("digest", "sha-256=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="), ("header", "X-Pay"), ("digest", ""), ("header", ""), ("opaque", ...), ("opaque", "")])
async def test_t03_slots_cannot_be_added_or_removed(world: World, slot: str, value: object) -> None:
    """T-03: a slot the challenge did not have cannot be added, and one it had cannot be dropped or emptied."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    assert await refused(world, bent(credential, f"challenge.{slot}", value)) == "invalid_challenge"


async def test_t04_p14_a_credential_buys_only_what_its_challenge_named(world: World) -> None:
    """T-04, P14: a challenge for one model does not pay for another of the same price, realm and amount."""
    channel = await world.opened()
    bought = await world.pay(world.payer.voucher(channel, 2 * UNIT), chat("dev/echo"))
    assert await refused(world, bought, chat("dev/story")) == "invalid_challenge"
    bodyless = await world.pay(world.payer.voucher(channel, 2 * UNIT))
    assert await refused(world, bodyless, chat("dev/echo")) == "invalid_challenge"
    assert (await world.send(chat("dev/echo"), bought)).status == 200, "the diagonal passes"


@pytest.mark.parametrize(
    "change",
    [
        {"amount": "1"},
        {"amount": "999999"},
        {"unitType": "request"},
        {"currency": "0x20c0000000000000000000000000000000000001"},
        {"recipient": "0x" + "11" * 20},
        {"methodDetails.chainId": 4217},
        {"methodDetails.escrowContract": "0x" + "22" * 20},
        {"methodDetails.sessionProtocol": "v1"},
        {"methodDetails.sessionProtocol": "v3"},
        {"amount": "0"},
        {"amount": 1000},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items())[:40],
)
async def test_t05_t17_the_echoed_request_must_be_this_routes(world: World, change: dict[str, Any]) -> None:
    """T-05, T-17, P15: even under our own MAC, a request with another price, payee, token, chain or escrow is refused."""
    body = chat()
    challenge = await world.challenge(body)
    request = decoded(challenge.request)
    for path, value in change.items():
        place = request
        *parents, name = path.split(".")
        for parent in parents:
            place = place[parent]
        place[name] = value
    forged = mac_of(world).issue(
        realm=challenge.realm,
        method="tempo",
        intent="session",
        request=encode_object(request),
        expires=challenge.expires or "",
        opaque=decoded(challenge.opaque or ""),
    )
    payload = world.payer.open(world.payer.channel())
    assert await refused(world, world.payer.credential(forged, payload), body) == "invalid_challenge"


@pytest.mark.parametrize(("slot", "value"), [("realm", "127.0.0.2"), ("method", "evm"), ("intent", "charge")])
async def test_p14_another_realm_method_or_intent_is_refused_under_our_own_mac(
    world: World, slot: str, value: str
) -> None:
    """P14: a secret shared by two services does not make their challenges interchangeable."""
    challenge = await world.challenge(chat())
    members = {"realm": challenge.realm, "method": "tempo", "intent": "session", slot: value}
    forged = mac_of(world).issue(
        **members, request=challenge.request, expires=challenge.expires or "", opaque=decoded(challenge.opaque or "")
    )
    reply = await world.send(chat(), world.payer.credential(forged, world.payer.open(world.payer.channel())))
    assert (reply.status, reply.code, reply.field) == (402, "invalid_challenge", slot)


async def test_t06_expiry_is_demanded_and_kept(world: World) -> None:
    """T-06, P17: a missing or unreadable expiry is an invalid challenge, a past one is expired; never a 500."""
    payload = world.payer.open(world.payer.channel())
    credential = await world.pay(payload)
    for value in (..., None, "", "not-a-date", 7, "2030-13-40T00:00:00Z", "9999-12-31T23:59:60Z"):
        code = await refused(world, bent(credential, "challenge.expires", value))
        assert code in ("invalid_challenge", "malformed_credential"), value
    world.clock.advance(301)
    assert await refused(world, credential) == "payment_expired"


@pytest.mark.parametrize(
    "text",
    [
        "2016-12-31T23:59:60Z",
        "2030-03-17t18:00:00Z",
        "2030-03-17T18:00:00z",
        "2030-03-17 18:00:00Z",
        "2030-03-17T18:00:00",
        "2030-03-17T18:00:00+24:00",
        "2030-02-30T18:00:00Z",
        "1969-12-31T23:59:59Z",
        "2030-03-17T18:00:00.Z",
        "20300317T180000Z",
        "\u0662030-03-17T18:00:00Z",
    ],
)
async def test_p17_odd_times_fail_closed_even_under_our_own_mac(world: World, text: str) -> None:
    """P17: a time with two readings, or none, never counts as the future."""
    challenge = await world.challenge()
    # Issued around its own check: ``issue`` would refuse to sign such a time.
    mac = mac_of(world)
    document = opened_json(world.payer.credential(challenge, world.payer.open(world.payer.channel())))
    document["challenge"]["expires"] = text
    if text.isascii():
        slots = [challenge.realm, "tempo", "session", challenge.request, text, "", challenge.opaque or ""]
        secret = world.net.payee_key.hex().encode()
        document["challenge"]["id"] = base64url.encode(hmac.digest(secret, "|".join(slots).encode(), "sha256"))
    assert mac.verify(challenge)
    assert await refused(world, sealed_json(document)) == "invalid_challenge"


@pytest.mark.parametrize("text", ["2030-03-17T17:47:00+00:00", "2030-03-17T19:47:00+02:00", "2030-03-17T17:47:00.5Z"])
async def test_t06_times_with_an_offset_are_times(world: World, text: str) -> None:
    """T-06: every RFC 3339 spelling of a future instant is accepted, compared as it was written."""
    challenge = await world.challenge()
    mine = mac_of(world).issue(
        realm=challenge.realm,
        method="tempo",
        intent="session",
        request=challenge.request,
        expires=text,
        opaque=decoded(challenge.opaque or ""),
    )
    reply = await world.send(None, world.payer.credential(mine, world.payer.open(world.payer.channel())))
    assert reply.status == 204, reply.body


@pytest.mark.parametrize(
    "value",
    ['Digest a="Payment x", b="y"', "Paymentx abc", "Basic Payment=", ""],
)
async def test_t07_another_scheme_is_no_credential(world: World, value: str) -> None:
    """T-07, P18: the word inside another scheme's value is not a credential."""
    assert await refused(world, value, chat()) == "payment_required"


@pytest.mark.parametrize("value", ['Bearer "x, Payment abc"', "Bearer sk-test", "Bearer Payment", "bearer ", "Bearer"])
async def test_t07_a_bearer_pays_by_another_rail(world: World, value: str) -> None:
    """T-07: the scheme decides: a bearer is an API key, whatever words it holds, and is refused as one."""
    reply = await world.send(chat(), value)
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    assert reply.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("prefix", ["payment ", "PAYMENT ", "Payment\t", "Payment    ", "Bearer x, Payment ", 'Digest a="b, c", payment '])
async def test_t07_the_scheme_is_read_case_insensitively_between_others(world: World, prefix: str) -> None:
    """T-07: any case, any white space, any company: the Payment credential is found."""
    token = (await world.pay(world.payer.open(world.payer.channel()))).split()[1]
    assert (await world.send(None, prefix + token)).status == 204


@pytest.mark.parametrize(
    "value",
    ["Payment", "Payment ", "Payment !!!", "Payment e30=x", 'Payment "abc', 'Payment a="b"', "Payment e30, Payment e30", "Payment \u20ac", "Payment " + "A" * 20_000],
)
async def test_p18_what_cannot_be_decoded_is_malformed(world: World, value: str) -> None:
    """P18: a Payment credential that is not one is malformed, never absent and never an error of ours."""
    assert await refused(world, value) == "malformed_credential"


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


async def test_t08_hostile_json_is_refused(world: World) -> None:
    """T-08, 2.0: prototypes, duplicates, nesting, wrong types, bad UTF-8 and null payloads are refused, cheaply."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    document = opened_json(credential)
    text = json.dumps(document)
    malformed = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"1",
        b"{}",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + text.encode(),
        text.encode() + b"x",
        text.replace('"payload"', '"payload":1,"payload"').encode(),
        text.replace('"id"', '"id":"x","id"').encode(),
        text.replace('"challenge": {', '"challenge": {"x": NaN,').encode(),
        text.replace('"challenge": {', '"challenge": {"x": Infinity,').encode(),
        text.replace('"challenge": {', '"challenge": {"x": 1e400,').encode(),
        text.replace('"challenge": {', '"challenge": {"x": 1.5,').encode(),
        text.replace('"challenge": {', '"challenge": {"x": "\\ud800",').encode(),
        text.replace('"challenge": {', '"challenge": {"x": ' + "9" * 5_000 + ",").encode(),
        text.replace('"challenge": {', '"challenge": {"x": ' + deep(17) + ",").encode(),
        ("[" * 10_000).encode(),
        deep(2_000).encode(),
        json.dumps({"challenge": document["challenge"]}).encode(),
        json.dumps({"payload": document["payload"]}).encode(),
        json.dumps({"challenge": [], "payload": {}}).encode(),
        json.dumps(document | {"source": 5}).encode(),
        *(json.dumps(document | {"challenge": document["challenge"] | {name: 5}}).encode() for name in document["challenge"]),
    ]
    for data in malformed:
        assert await refused(world, authorization(base64url.encode(data))) == "malformed_credential", data[:80]
    for payload in (None, [], 1, "open", {}, {"action": "open"}, {"action": "transfer"}, {"action": ["open"]}):
        code = await refused(world, sealed_json(document | {"payload": payload}))
        assert code == "invalid_payload", payload


async def test_t08_unknown_members_are_ignored_wherever_they_are(world: World) -> None:
    """T-08: members with dangerous names are members like any other unknown one."""
    document = opened_json(await world.pay(world.payer.open(world.payer.channel())))
    for place in (document, document["payload"], document["payload"]["descriptor"]):
        place.update({"__proto__": {"x": 1}, "constructor": None, "toString": "x"})
    assert (await world.send(None, sealed_json(document))).status == 204


async def test_t09_p33_nothing_of_the_request_reaches_a_header(world: World) -> None:
    """T-09, P33: a model name with line breaks or quotes is refused, and the challenge's own text is plain ASCII."""
    for model in ("x\r\nSet-Cookie: a=b", 'a", id="forged', "caf\u00e9", "\\"):
        reply = await world.send(chat(model))
        assert (reply.status, reply.field) == (400, "model")
        assert "Set-Cookie" not in reply.headers
    header = (await world.send(chat())).headers["WWW-Authenticate"]
    assert header.isascii()
    assert header.isprintable()
    unknown = await world.send(chat("nobody/sells-this"))
    assert b"nobody" not in unknown.body, "what a stranger typed is not repeated"


async def test_t10_padded_base64_and_decoded_opaque_are_read(world: World) -> None:
    """T-10: standard base64 with padding is the same credential, and so is one whose opaque is still an object."""
    document = opened_json(await world.pay(world.payer.open(world.payer.channel())))
    padded = base64url.encode_padded(json.dumps(document).encode())
    assert (await world.send(None, f"Payment {padded}")).status == 204
    document = opened_json(await world.pay(world.payer.open(world.payer.channel())))
    document["challenge"]["opaque"] = decoded(document["challenge"]["opaque"])
    assert (await world.send(None, sealed_json(document))).status == 204


async def test_2_0_a_credential_has_one_spelling(world: World) -> None:
    """2.0: foreign characters, loose bits and mixed alphabets are refused: a text may not have twins."""
    token = (await world.pay(world.payer.open(world.payer.channel()))).split()[1]
    twins = [token[:40] + "\u00a0" + token[40:], token + "=" * (1 + (-len(token)) % 4), token[:-1] + "?", token + "A" * (1 + (-len(token)) % 4), "-+" + token[2:]]
    for twin in twins:
        assert await refused(world, f"Payment {twin}") == "malformed_credential"


async def test_t11_answers_without_a_body_have_none(world: World) -> None:
    """T-11, T-63: HEAD gets the same headers and no body, OPTIONS is free, a 204 carries its receipt and nothing else."""
    head = await world.send(method="HEAD")
    assert (head.status, head.body) == (402, b"")
    assert head.challenges
    options = await world.send(method="OPTIONS", headers={"Origin": "https://x", "Access-Control-Request-Method": "POST"})
    assert (options.status, options.body) == (204, b"")
    before = await world.state()
    paid = await world.pay(world.payer.open(world.payer.channel()))
    assert (await world.send(None, paid, method="OPTIONS")).status == 204
    assert await world.state() == before, "a preflight with a credential opens nothing"
    opened = await world.send(None, paid, method="HEAD")
    assert (opened.status, opened.body) == (204, b"")
    assert opened.receipt is not None
    reply = await world.send(None, "Payment !!!", method="HEAD")
    assert (reply.status, reply.body) == (402, b"")


async def test_t11a_nothing_paid_is_cached_by_others(world: World) -> None:
    """T-11a, N4: refusals are no-store, paid answers are private."""
    assert (await world.send(chat())).headers["Cache-Control"] == "no-store"
    channel = await world.opened(cumulative=50 * UNIT)
    for body in (chat(), chat(stream=False)):
        reply = await world.buy(body, world.payer.voucher(channel, 50 * UNIT))
        assert reply.status == 200
        assert "private" in reply.headers["Cache-Control"]
    managed = await world.manage(world.payer.voucher(channel, 50 * UNIT))
    assert "private" in managed.headers["Cache-Control"]


@pytest.mark.parametrize(
    "lines",
    [
        b"Host: evil.example\r\n",
        b"Host: evil.example\r\nX-Forwarded-Host: evil2\r\nForwarded: host=evil3\r\n",
        b"Host: [::1\r\n",
        b"Host: a b\r\n",
        b"Host: \r\n",
        b"",
    ],
)
async def test_t11b_the_realm_is_configured_not_claimed(world: World, lines: bytes) -> None:
    """T-11b, N2: whatever the client calls us, the realm is ours; a Host nobody can parse is a 4xx at worst."""
    answer = await world.raw(b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n" + lines + b"\r\n")
    status = int(answer.split()[1])
    assert status in (400, 402)
    assert b"evil" not in answer
    if status == 402:
        assert b'realm="127.0.0.1"' in answer


async def test_t11b_an_absolute_target_does_not_change_the_realm(world: World) -> None:
    """N2: the absolute form of a request target names another host and changes nothing."""
    answer = await world.raw(
        b"POST http://evil.example/v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    assert int(answer.split()[1]) in (400, 402, 404)
    assert b"evil" not in answer


async def test_t11c_no_refusal_carries_a_receipt(world: World) -> None:
    """T-11c: 400, 402, 404, 405, 410, 413 and 5xx answers have no receipt (T-49 is the one exception)."""
    channel = await world.opened()
    stranger = world.payer.channel()
    replies = [
        await world.send(b"{"),
        await world.send(chat()),
        await world.send(chat("no/such")),
        await world.send(method="GET"),
        await world.manage(world.payer.voucher(stranger, UNIT)),
        await world.send(b"x" * (1024 * 1024 + 1)),
        await world.buy(chat("dev/error-500"), world.payer.voucher(channel, 2 * UNIT)),
    ]
    assert [reply.status for reply in replies] == [400, 402, 404, 405, 410, 413, 502]
    assert all("Payment-Receipt" not in reply.headers for reply in replies)


async def test_t11d_both_credential_headers_work(world: World) -> None:
    """T-11d: a credential in Payment-Authorization works beside an API key, and management in Authorization does too."""
    channel = world.payer.channel()
    credential = await world.pay(world.payer.open(channel))
    reply = await world.send(None, "Bearer sk-key", headers={"Payment-Authorization": credential})
    assert reply.status == 204
    assert (await world.manage(world.payer.voucher(channel, 2 * UNIT))).status == 204


async def test_t11e_vouchers_are_not_bound_to_a_body(world: World) -> None:
    """T-11e: no digest is advertised, so the empty body of a mid-stream voucher answers the content's own challenge."""
    body = chat("dev/story", max_tokens=5)
    channel = world.payer.channel()
    challenge = await world.challenge(body)
    assert challenge.digest is None
    async with world.stream(body, world.payer.credential(challenge, world.payer.open(channel))) as stream:
        await stream.rest()
    reply = await world.send(None, world.payer.credential(challenge, world.payer.voucher(channel, 2 * UNIT)))
    assert reply.status == 204


async def test_p16_slots_cannot_be_shifted(world: World) -> None:
    """P16: the separator inside a slot is refused, so no two challenges share an id."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    challenge = opened_json(credential)["challenge"]
    shifted = bent(bent(credential, "challenge.realm", f"{challenge['realm']}|tempo"), "challenge.method", "session")
    assert await refused(world, shifted) == "invalid_challenge"
    for slot in ("realm", "method", "intent", "request", "expires", "opaque"):
        assert await refused(world, bent(credential, f"challenge.{slot}", challenge[slot] + "|")) == "invalid_challenge"


async def test_t86_an_unknown_secret_is_found(world: World) -> None:
    """P14: a challenge under another secret is not ours, however well-formed."""
    challenge = await world.challenge()
    other = ChallengeMac((b"x" * 32,)).issue(
        realm=challenge.realm,
        method="tempo",
        intent="session",
        request=challenge.request,
        expires=to_rfc3339(UnixMillis(world.clock.now_millis() + 60_000)),
        opaque=decoded(challenge.opaque or ""),
    )
    payload = world.payer.open(world.payer.channel())
    assert await refused(world, authorization(encode(Credential(other, payload, None)))) == "invalid_challenge"


async def test_the_payload_of_a_forged_challenge_is_never_looked_at(world: World) -> None:
    """The order of checks: a payload fault may not hide a forged challenge, and a v1 challenge carries no v2 channel."""
    channel = world.payer.channel()
    credential = await world.pay(world.payer.open(channel))
    document = opened_json(credential)
    document["challenge"]["id"] = "x"
    document["payload"] = {"action": "nonsense"}
    assert await refused(world, sealed_json(document)) == "invalid_challenge"
    older = await world.challenge(None, V1.protocol)
    mixed = sealed_json({"challenge": opened_json(world.payer.credential(older, world.payer.open(channel)))["challenge"], "payload": payload_to_json(world.payer.open(channel))})
    assert await refused(world, mixed) in ("transaction_rejected", "descriptor_mismatch")


async def test_p20_only_the_listed_methods_exist(world: World) -> None:
    """P20: every other method is refused before any work, paid or not."""
    credential = await world.pay(world.payer.open(world.payer.channel()))
    before = await world.state()
    for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"):
        for sent in (None, credential):
            reply = await world.send(None, sent, method=method, path=PATH)
            assert (reply.status, reply.code) == (405, "method_not_allowed"), method
    assert await world.state() == before
