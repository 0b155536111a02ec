"""Fn Project's HTTP interface of 2017: its routes call functions, sync or async, and tell errors in its own form."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SECRET, Daemon, Reply, Server, StartDaemon, answer, ask


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


async def get(gateway: Daemon, target: str) -> Any:
    """The JSON document at a path."""
    reply = await ask(gateway.url, target)
    assert reply.status == 200, reply
    assert reply.headers["Content-Type"].startswith("application/json")
    return json.loads(reply.body)


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


# ---- async functions -------------------------------------------------------------------------------------------


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
        f'[functions.hello]\nurl = "{function.url}"\n'
        f'[auth]\nuser_file = "{tmp_path}/user"\npassword_file = "{tmp_path}/password"'
    )
    call_id = await call(gateway)
    assert (await ask(gateway.url, "/r/myapp/hello")).status == 200
    for target in ("", f"/{call_id}", f"/{call_id}/log"):
        reply = await ask(gateway.url, f"/v1/apps/myapp/calls{target}")
        assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, 'Basic realm="Restricted"')
