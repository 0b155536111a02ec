"""Fn Project's HTTP interface of 2017: the walk-through of its tutorial for async functions, and the rest of it."""

import base64
import json
from datetime import datetime
from pathlib import Path

import pytest
from conftest import PYTHON, SECRET, Daemon, Gate, Reply, Server, StartDaemon, answer, ask, never, run
from operating import get


@pytest.fixture
async def gateway(daemon: StartDaemon, function: Server, refused: str) -> Daemon:
    """A daemon with an async function, `hello-async`, a sync one, `hello`, and one that is down, `dead`."""
    return await daemon(
        f'[functions.hello-async]\nurl = "{function.url}"\ntype = "async"\n'
        f'[functions.hello]\nurl = "{function.url}"\n[functions.dead]\nurl = "{refused}"\n'
        '[gateway]\nmax_payload = "1KiB"\n[retry]\nattempts = 1'
    )


async def call(gateway: Daemon, app: str = "myapp", body: bytes = b"") -> str:
    """Call the async function; the call id of the answer."""
    reply = await ask(gateway.url, f"/r/{app}/hello-async", method="POST", body=body)
    assert reply.status == 202, reply
    ((name, call_id),) = json.loads(reply.body).items()
    assert name == "call_id"
    return str(call_id)


def assert_error(reply: Reply, status: int) -> str:
    """An error in Fn's form; its message."""
    assert reply.status == status, reply
    assert reply.headers["Content-Type"].startswith("application/json")
    document = json.loads(reply.body)
    message = document["error"]["message"]
    assert document == {"error": {"message": message}}
    assert message
    assert SECRET.decode() not in message
    return str(message)


# ---- the walk-through ------------------------------------------------------------------------------------------


async def test_the_tutorial_works_with_curl(daemon: StartDaemon) -> None:
    """Call it, keep the id, get the call, get its log: with a command as function, as a person would do it."""
    code = "import sys; name = sys.stdin.read(); print('Hello', name); print('called for', name, file=sys.stderr)"
    words = json.dumps([*PYTHON, code])
    gateway = await daemon(f'[functions.hello-async]\ncommand = {words}\ntype = "async"')
    called = await run("curl", "-sS", "-d", "Johnny", f"{gateway.url}/r/myapp/hello-async")
    call_id = json.loads(called.out)["call_id"]
    await gateway.final(call_id)
    got = await run("curl", "-sS", "-f", f"{gateway.url}/v1/apps/myapp/calls/{call_id}")
    assert json.loads(got.out)["call"]["status"] == "success"
    log = await run("curl", "-sS", "-f", f"{gateway.url}/v1/apps/myapp/calls/{call_id}/log")
    assert sorted(json.loads(log.out)["log"]["log"].splitlines()) == ["Hello Johnny", "called for Johnny"]


async def test_an_async_function_is_queued(gateway: Daemon, function: Server) -> None:
    """202 and the id of the call in JSON; the function runs with the body that was sent."""
    reply = await ask(gateway.url, "/r/myapp/hello-async", method="POST", body=b'{"name": "Johnny"}')
    assert (reply.status, reply.headers["Content-Type"].partition(";")[0]) == (202, "application/json")
    (request,) = await function.wait_for(1)
    assert json.loads(reply.body) == {"call_id": request.call_id}
    assert (request.method, request.target, request.body) == ("POST", "/", b'{"name": "Johnny"}')


async def test_a_queued_call_is_taken_by_any_method(gateway: Daemon, function: Server) -> None:
    """Fn's routes have none of their own; the function is called with a POST."""
    for number, method in enumerate(("GET", "PUT", "POST"), 1):
        reply = await ask(gateway.url, "/r/myapp/hello-async", method=method)
        assert (reply.status, list(json.loads(reply.body))) == (202, ["call_id"])
        await function.wait_for(number)
    assert {request.method for request in function.requests} == {"POST"}


async def test_a_call_can_be_got(gateway: Daemon) -> None:
    """With exactly the fields that Fn has, and the three times in their order."""
    call_id = await call(gateway)
    await gateway.final(call_id)
    document = await get(gateway, f"/v1/apps/myapp/calls/{call_id}")
    assert set(document) == {"message", "call"}
    assert document["message"]
    found = document["call"]
    times = [datetime.fromisoformat(found.pop(name)) for name in ("created_at", "started_at", "completed_at")]
    assert found == {"id": call_id, "app_name": "myapp", "path": "/hello-async", "status": "success"}
    assert times == sorted(times)
    assert all(time.tzinfo is not None for time in times)


async def test_the_status_is_told_in_fns_words(gateway: Daemon, function: Server) -> None:
    """While the call runs, and for each of the ways in which it may end."""

    async def status(call_id: str) -> str:
        return str((await get(gateway, f"/v1/apps/myapp/calls/{call_id}"))["call"]["status"])

    function.behaviour = gate = Gate()
    good = await call(gateway)
    await function.wait_for(1)
    assert await status(good) == "running"
    gate.open()
    await gateway.final(good)
    function.behaviour = answer(500)
    bad = await call(gateway)
    await gateway.final(bad)
    function.behaviour = never
    stopped = await call(gateway)
    assert (await ask(gateway.url, f"/async-function/{stopped}", method="DELETE")).status == 202
    assert [await status(call_id) for call_id in (good, bad, stopped)] == ["success", "error", "cancelled"]


async def test_the_calls_of_an_app_are_listed(gateway: Daemon) -> None:
    """The newest first, each as it is shown alone, and none of another app."""
    calls = [await call(gateway) for _ in range(3)]
    other = await call(gateway, "otherapp")
    for call_id in (*calls, other):
        await gateway.final(call_id)
    document = await get(gateway, "/v1/apps/myapp/calls")
    single = [(await get(gateway, f"/v1/apps/myapp/calls/{call_id}"))["call"] for call_id in calls]
    assert document["calls"] == single[::-1]
    assert document["message"]
    assert [found["id"] for found in (await get(gateway, "/v1/apps/otherapp/calls"))["calls"]] == [other]


async def test_the_calls_of_an_app_come_in_pages(gateway: Daemon) -> None:
    """As Fn has them: `per_page`, and the cursor of the next page, which is empty at the end."""
    calls = [await call(gateway) for _ in range(3)]
    await call(gateway, "otherapp")
    first = await get(gateway, "/v1/apps/myapp/calls?per_page=2&cursor=")
    second = await get(gateway, f"/v1/apps/myapp/calls?per_page=2&cursor={first['next_cursor']}")
    assert [found["id"] for found in (*first["calls"], *second["calls"])] == calls[::-1]
    assert (len(first["calls"]), second["next_cursor"]) == (2, "")
    assert len((await get(gateway, "/v1/apps/myapp/calls?limit=1"))["calls"]) == 1
    for query in ("per_page=many", "limit=0", "cursor=x"):
        assert_error(await ask(gateway.url, f"/v1/apps/myapp/calls?{query}"), 400)


async def test_the_log_of_a_call_can_be_got(gateway: Daemon, function: Server) -> None:
    """What the function answered; what is not UTF-8 of it does not stand in the way of the rest."""
    for body, shown in ((b"Hello Johnny!\n", "Hello Johnny!\n"), (b"<\xff\x00>", "<\ufffd\x00>")):
        function.behaviour = answer(body=body)
        call_id = await call(gateway)
        await gateway.final(call_id)
        document = await get(gateway, f"/v1/apps/myapp/calls/{call_id}/log")
        assert set(document) == {"message", "log"}
        assert document["log"] == {"call_id": call_id, "log": shown}


async def test_an_app_survives_a_restart(gateway: Daemon) -> None:
    """The label is part of the record."""
    call_id = await call(gateway)
    await gateway.final(call_id)
    before = await get(gateway, "/v1/apps/myapp/calls")
    await gateway.kill()
    await gateway.start()
    assert await get(gateway, "/v1/apps/myapp/calls") == before
    assert len(before["calls"]) == 1


async def test_a_call_by_fns_route_is_a_call_like_any_other(gateway: Daemon, function: Server, sink: Server) -> None:
    """Its record is in the operator's list, and the control headers mean the same."""
    headers = ("X-Call-Id: mine", f"X-Callback-Url: {sink.url}", "X-Max-Attempts: 1")
    reply = await ask(gateway.url, "/r/myapp/hello-async/sub?q=%2F", *headers, method="POST", body=b"body")
    assert (reply.status, json.loads(reply.body)) == (202, {"call_id": "mine"})
    record = await gateway.final("mine")
    assert (record["function"], record["max_attempts"], record["callback"]["status"]) == ("hello-async", 1, "delivered")
    assert [found["call_id"] for found in (await get(gateway, "/system/calls"))["calls"]] == ["mine"]
    assert function.requests[0].target == "/sub?q=%2F"


# ---- sync functions --------------------------------------------------------------------------------------------


async def test_a_sync_function_answers_directly(gateway: Daemon, function: Server) -> None:
    """Status, headers and body are the function's, its errors too, for any method, path and query."""
    function.behaviour = answer(418, b"short and stout", X_Own="v", Content_Type="text/x-tea")
    for method in ("GET", "POST", "PUT", "DELETE"):
        reply = await ask(gateway.url, "/r/myapp/hello/a%2Fb?x=%20", method=method, body=b"body")
        assert (reply.status, reply.body, reply.headers["X-Own"]) == (418, b"short and stout", "v")
        assert reply.headers["Content-Type"] == "text/x-tea"
    seen = {(request.target, request.body) for request in function.requests}
    assert seen == {("/a%2Fb?x=%20", b"body")}
    assert [request.method for request in function.requests] == ["GET", "POST", "PUT", "DELETE"]


# ---- errors ----------------------------------------------------------------------------------------------------


async def test_what_does_not_exist_is_not_found(gateway: Daemon, function: Server) -> None:
    """404 for a route, a call and a log, for the call of another app, and for one that belongs to none."""
    call_id = await call(gateway)
    without = await gateway.submit("hello-async")
    for target in ("calls/nosuch", "calls/nosuch/log"):
        assert_error(await ask(gateway.url, f"/v1/apps/myapp/{target}"), 404)
    for suffix in ("", "/log"):
        assert_error(await ask(gateway.url, f"/v1/apps/otherapp/calls/{call_id}{suffix}"), 404)
        for app in ("myapp", "None", "null", "%20"):
            assert_error(await ask(gateway.url, f"/v1/apps/{app}/calls/{without}{suffix}"), 404)
    for target in ("/r/myapp/nosuch", "/r/myapp", "/r/myapp/", "/v1/nosuch"):
        assert_error(await ask(gateway.url, target, method="POST", body=SECRET), 404)


async def test_a_request_that_is_refused_is_told_in_fns_form(gateway: Daemon) -> None:
    """The statuses are those of the other routes."""
    target = "/r/myapp/hello-async"
    assert "X-Delay" in assert_error(await ask(gateway.url, target, "X-Delay: soon", method="POST", body=SECRET), 400)
    assert_error(await ask(gateway.url, target, method="POST", body=SECRET * 100), 413)
    assert (await ask(gateway.url, target, "Idempotency-Key: k", method="POST", body=b"body")).status == 202
    assert_error(await ask(gateway.url, target, "Idempotency-Key: k", method="POST", body=SECRET), 422)
    assert_error(await ask(gateway.url, "/r/myapp/dead", method="POST", body=SECRET), 502)


# ---- credentials -----------------------------------------------------------------------------------------------


async def test_only_the_calls_need_credentials(daemon: StartDaemon, function: Server, tmp_path: Path) -> None:
    """With `[auth]`, `/v1` asks for them and `/r` does not."""
    (tmp_path / "user").write_text("admin\n")
    (tmp_path / "password").write_text("secret\n")
    gateway = await daemon(
        f'[functions.hello-async]\nurl = "{function.url}"\ntype = "async"\n'
        f'[auth]\nuser_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    )
    call_id = await call(gateway)
    header = "Authorization: Basic " + base64.b64encode(b"admin:secret").decode()
    wrong = "Authorization: Basic " + base64.b64encode(b"admin:wrong").decode()
    for target in ("", f"/{call_id}", f"/{call_id}/log"):
        for headers in ((), (wrong,)):
            reply = await ask(gateway.url, f"/v1/apps/myapp/calls{target}", *headers)
            assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Basic realm="Restricted"')
        assert (await ask(gateway.url, f"/v1/apps/myapp/calls{target}", header)).status == 200
