"""A loopback server that speaks the OpenAI, DashScope and vLLM protocols, and misbehaves on demand.

The tests point the real SDKs at it. What each call gets back is decided by one function, `answer`:

    with Api(lambda call: "Paris." if call.model == "gpt-4o" else Fault(429)) as api:
        subprocess.run([...], env=api.env())
    assert api.count("gpt-4o") == 3 and api.peak <= 8

`python tests/server.py --port 8000` serves the deterministic `demo_world` until Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from aiohttp import web

OPENAI_KEY, DASHSCOPE_KEY = "sk-test-openai-5e1f0c77a9", "sk-test-dashscope-b84d2260f3"
PROTOCOLS = {
    "/v1/chat/completions": "openai",
    "/api/v1/services/aigc/text-generation/generation": "dashscope",
    "/api/v1/services/aigc/multimodal-generation/generation": "multimodal",
    "/classify": "reward",
    "/v1/classify": "reward",
}
CODES = {  # what OpenAI and DashScope call a status; any other goes by the 500
    400: ("invalid_value", "InvalidParameter"),
    401: ("invalid_api_key", "InvalidApiKey"),
    404: ("model_not_found", "ModelNotFound"),
    429: ("rate_limit_exceeded", "Throttling.RateQuota"),
    500: ("server_error", "InternalError"),
}
JSON, HTML = "application/json", "text/html"
PAGE = "<html><head><title>Gateway</title></head><body><h1>Something went wrong</h1></body></html>"


@dataclass
class Call:
    """One request as it arrived: contents flattened to text, header names in lower case."""

    protocol: str  # openai, dashscope, multimodal or reward
    model: str
    messages: list[dict]
    params: dict
    headers: dict
    time: float = field(default_factory=time.monotonic)

    @property
    def prompt(self) -> str:
        """The last thing the user said."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass
class Reply:
    """A good answer. Tokens left out are estimated; `content`, if given, goes into the message as it is.

    more: further fields of the message (refusal, reasoning_content); model: the name of who answers."""

    text: str
    finish: str | None = "stop"
    tokens_in: int | None = None
    tokens_out: int | None = None
    content: object = ...
    more: dict = field(default_factory=dict)
    model: str = ""


@dataclass
class Fault:
    """A bad answer; without a code it has the protocol's usual one for its status. Kinds:

    error    a JSON error in the protocol's own shape    html           an HTML page with the status
    garbage  200 and JSON that breaks off                not_json_type  200 and an HTML page
    empty    200 and no body                             no_choices     200 and an empty list of choices
    cut      200, closed before the promised length      null_content   200 and a message without content
    chunked  200, closed between two chunks              delimited      200, JSON cut where the connection ends
    body     the status and `body` labelled JSON, whatever it holds; text: the same, labelled text/plain
    close, reset: the connection ends before a byte, by FIN or by RST
    hang, drip: no end, with silence or a byte every 0.2 s, until the client leaves
    """

    status: int = 500
    code: str = ""
    message: str = "scripted fault"
    headers: dict = field(default_factory=dict)
    kind: str = "error"
    body: bytes = b""


def parse(protocol: str, body: dict, headers) -> Call:
    """The JSON of a request -> Call. Each text given to a reward model becomes a user message."""

    def flat(content) -> str:
        parts = content if isinstance(content, list) else [content or ""]
        return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)

    given = body.get("input", body)
    if not isinstance(given, dict):
        texts = given if isinstance(given, list) else [given]
        given = {"messages": [{"role": "user", "content": text} for text in texts]}
    messages = [{"role": m["role"], "content": flat(m["content"])} for m in given["messages"]]
    params = {key: body[key] for key in body.keys() - {"model", "messages", "input", "parameters"}}
    params |= body.get("parameters", {})
    return Call(
        protocol,
        body.get("model", ""),
        messages,
        params,
        {k.lower(): v for k, v in headers.items()},
    )


def success(call: Call, reply: Reply, choices: bool = True) -> dict:
    """The JSON of a 200. A reward model's text is its number; for several inputs, as many numbers."""
    content = reply.text if reply.content is ... else reply.content
    size = sum(len(message["content"]) for message in call.messages)
    used_in = size // 4 + 1 if reply.tokens_in is None else reply.tokens_in
    used_out = len(reply.text) // 4 + 1 if reply.tokens_out is None else reply.tokens_out
    head = {
        "id": os.urandom(16).hex(),
        "created": int(time.time()),
        "model": reply.model or call.model,
    }
    usage = {
        "prompt_tokens": used_in,
        "completion_tokens": used_out,
        "total_tokens": used_in + used_out,
    }
    if call.protocol == "reward":
        probs = [None] if content is None else [float(number) for number in content.split()]
        data = [
            {"index": i, "label": "LABEL_0", "probs": [p], "num_classes": 1}
            for i, p in enumerate(probs)
        ]
        return head | {"object": "list", "data": data if choices else [], "usage": usage}
    if call.protocol == "multimodal" and isinstance(content, str):
        content = [{"text": content}]
    message = {"role": "assistant", "content": content, **reply.more}
    made = [{"index": 0, "finish_reason": reply.finish, "message": message}] if choices else []
    if call.protocol == "openai":
        return head | {"object": "chat.completion", "choices": made, "usage": usage}
    usage = {"input_tokens": used_in, "output_tokens": used_out, "total_tokens": used_in + used_out}
    return {"output": {"choices": made}, "usage": usage, "request_id": head["id"]}


def streams(call: Call) -> bool:
    """Whether the client asks for a stream."""
    return bool(call.params.get("stream")) or call.headers.get("x-dashscope-sse") == "enable"


def events(call: Call, reply: Reply) -> bytes:
    """A reply as server-sent events: its text in two parts, then the finish reason, then the usage."""
    whole = success(call, reply)
    holder = whole if call.protocol == "openai" else whole["output"]
    [choice] = holder["choices"]
    message, usage = choice.pop("message"), whole.pop("usage")
    name = "delta" if call.protocol == "openai" else "message"
    half = len(reply.text) // 2
    steps = [
        ({"content": reply.text[:half]}, None, None),
        ({"content": reply.text[half:]}, None, None),
    ]
    if call.protocol == "multimodal":
        steps = [({"content": [{"text": step[0]["content"]}]}, None, None) for step in steps]
    if message["content"] is None:
        steps = [({key: value}, None, None) for key, value in message.items() if key != "role"]
    steps += [({"content": [] if call.protocol == "multimodal" else ""}, reply.finish, usage)]
    chunks = []
    for part, finish, used in steps:
        holder["choices"] = [
            {"index": 0, name: {"role": "assistant", **part}, "finish_reason": finish}
        ]
        counted = call.protocol != "openai" or "stream_options" in call.params
        chunks.append(json.dumps(whole | ({"usage": used} if used and counted else {})))
    if call.protocol == "openai":
        return "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]).encode()
    head = "event:result\n:HTTP_STATUS/200\n"
    return "".join(f"id:{n}\n{head}data:{chunk}\n\n" for n, chunk in enumerate(chunks, 1)).encode()


def failure(protocol: str, fault: Fault) -> dict:
    """The JSON of an error."""
    dashscope = protocol in ("dashscope", "multimodal")
    code = fault.code or CODES.get(fault.status, CODES[500])[dashscope]
    if dashscope:
        return {"code": code, "message": fault.message, "request_id": os.urandom(16).hex()}
    return {"error": {"message": fault.message, "type": code, "code": code, "param": None}}


async def misbehave(request: web.Request, call: Call, fault: Fault) -> web.StreamResponse:
    """Do what the fault says: return a bad response, or ruin the connection it would go out on."""
    bodies = {
        "error": (fault.status, JSON, json.dumps(failure(call.protocol, fault))),
        "html": (fault.status, HTML, PAGE),
        "not_json_type": (200, HTML, PAGE),
        "garbage": (200, JSON, '{"choices": [{"mess'),
        "empty": (200, JSON, ""),
        "no_choices": (200, JSON, json.dumps(success(call, Reply(""), choices=False))),
        "null_content": (200, JSON, json.dumps(success(call, Reply("", content=None)))),
    }
    if fault.kind in bodies:
        status, kind, text = bodies[fault.kind]
        return web.Response(text=text, status=status, content_type=kind, headers=fault.headers)
    if fault.kind in ("body", "text"):
        kind = JSON if fault.kind == "body" else "text/plain"
        return web.Response(
            body=fault.body, status=fault.status, content_type=kind, headers=fault.headers
        )
    response = web.StreamResponse(
        headers={"Content-Type": JSON, "Content-Length": "999999", **fault.headers}
    )
    match fault.kind:
        case "cut" | "drip":
            with suppress(ConnectionError):
                await response.prepare(request)
                await response.write(b"{")
                while fault.kind == "drip":
                    await asyncio.sleep(0.2)
                    await response.write(b" ")
        case "chunked" | "delimited":
            end = (
                "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
                if fault.kind == "chunked"
                else "\r\n{"
            )
            request.transport.write(f"HTTP/1.1 200 OK\r\nContent-Type: {JSON}\r\n{end}".encode())
            await asyncio.sleep(0.01)
        case "hang":
            await asyncio.Event().wait()
        case "reset":  # a socket that lingers for zero seconds closes with RST
            linger = struct.pack("ii", 1, 0)
            request.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        case other if other != "close":
            raise ValueError(f"no such kind of fault: {other}")
    request.transport.close()
    return response


class Api:
    """The server, alive inside a `with`, on a thread of its own.

    answer(call) -> str | number | Reply | Fault, plain or async. It runs on the server's loop: it may keep
    plain state, and must not block. What it raises is answered with 500 and raised again by the `with`.
    latency: seconds added to each answer. limit: calls in any one second; more are refused with 429, and
    told to come again after `retry_after` seconds if it is given.
    """

    def __init__(
        self, answer, latency: float = 0.0, limit: int | None = None, port: int = 0, retry_after=""
    ):
        self._answer, self._latency, self._port = answer, latency, port
        self._refusal = Fault(
            429, message="rate limit", headers={"Retry-After": retry_after} if retry_after else {}
        )
        self._accepted: deque[float] = deque(maxlen=limit)
        self.calls: list[Call] = []  # in order of arrival, the refused too
        self.errors: list[Exception] = []
        self.models: list[str] = []  # what GET /v1/models lists; empty: 404
        self.in_flight = self.peak = 0
        self.engine = BatchEngine(answer)

    def __enter__(self) -> "Api":
        listener = socket.create_server(("127.0.0.1", self._port), backlog=1024)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.openai_url, self.dashscope_url = f"{self.url}/v1", f"{self.url}/api/v1"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(listener), self._loop).result()
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.errors:
            raise self.errors[0]

    def count(self, model: str | None = None) -> int:
        """How many calls arrived, for one model or for all."""
        return sum(model in (None, call.model) for call in self.calls)

    def env(self, **more) -> dict[str, str]:
        """An environment in which a script finds only this server; `NAME=None` leaves a variable out."""
        ours = {"OPENAI_BASE_URL": self.openai_url, "OPENAI_API_KEY": OPENAI_KEY, "PYTHONUTF8": "1"}
        ours |= {
            "DASHSCOPE_HTTP_BASE_URL": self.dashscope_url,
            "DASHSCOPE_API_KEY": DASHSCOPE_KEY,
        } | more
        foreign = re.compile(r"(OPENAI|DASHSCOPE)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        return {name: value for name, value in (kept | ours).items() if value is not None}

    async def _start(self, listener: socket.socket) -> None:
        app = web.Application(client_max_size=2**28)
        app.add_routes([web.post(path, self._handle) for path in PROTOCOLS])
        app.add_routes([web.get("/stats", self._stats), web.get("/v1/models", self._list_models)])
        for root in ("/v1", "/compatible-mode/v1"):
            app.add_routes(self.engine.routes(root))
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.05
        )
        await self._runner.setup()
        await web.SockSite(self._runner, listener, backlog=1024).start()

    async def _stats(self, request: web.Request) -> web.Response:
        """For who started us as a process: calls so far, seconds from the first to the last, CPU seconds."""
        times = [call.time for call in self.calls] or [0.0]
        stats = {"calls": len(self.calls), "span": times[-1] - times[0], "cpu": time.process_time()}
        return web.json_response(stats)

    async def _list_models(self, request: web.Request) -> web.Response:
        """The models that are served, as OpenAI lists them."""
        if not self.models:
            return web.Response(status=404, text="404 page not found")
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.models
        ]
        return web.json_response({"object": "list", "data": data})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body, protocol = await request.read(), PROTOCOLS[request.path]
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            call = parse(protocol, json.loads(body), request.headers)
            self.calls.append(call)
            if len(self._accepted) == self._accepted.maxlen and call.time < self._accepted[0] + 1:
                return await misbehave(request, call, self._refusal)
            self._accepted.append(call.time)
            reply = self._answer(call)
            if asyncio.iscoroutine(reply):
                reply = await reply
            await asyncio.sleep(self._latency)
            if isinstance(reply, Fault):
                return await misbehave(request, call, reply)
            if isinstance(reply, str | int | float):
                reply = Reply(str(reply))
            if streams(call):
                return web.Response(body=events(call, reply), content_type="text/event-stream")
            return web.json_response(success(call, reply))
        except Exception as error:
            self.errors.append(error)
            return web.json_response(failure(protocol, Fault(message=repr(error))), status=500)
        finally:  # before the response is sent, or the client's next call would overlap with this one
            self.in_flight -= 1


class BatchEngine:
    """Files and batches as OpenAI's and Model Studio's engines keep them; `answer` decides each request.

    A Fault goes to the error file. Results come shuffled. A test may set: `looks`, how often a batch is seen
    in progress; `ends(batch, requests)`, its last status, of which expired and cancelled answer half of the
    requests, and "failed:CODE" none; `uploading()`, `creating(requests)` and `looking()`, a Fault for these or None; `lost`, whether
    the answer to a creation gets lost; `spoil(lines)`, what becomes of a file of results.
    """

    def __init__(self, answer):
        self.answer, self.looks = answer, 1
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.calls: list[Call] = []  # every request that was answered
        self.keys: list[str] = []  # and its custom_id
        self.ends = lambda batch, requests: "completed"
        self.creating = lambda requests: None
        self.spoil = lambda lines: lines
        self.uploading = lambda: None
        self.looking = lambda: None
        self.lost = False

    def routes(self, root: str) -> list:
        return [
            web.post(f"{root}/files", self._upload),
            web.get(f"{root}/files/{{id}}/content", self._content),
            web.post(f"{root}/batches", self._create),
            web.get(f"{root}/batches", self._list),
            web.get(f"{root}/batches/{{id}}", self._look),
        ]

    def store(self, data: bytes) -> str:
        self.files[name := f"file-{len(self.files) + 1}"] = data
        return name

    @staticmethod
    def _refuse(fault: Fault) -> web.Response:
        """An error in JSON; a web page for the fault kind html."""
        if fault.kind == "html":
            return web.Response(text=PAGE, content_type=HTML, status=fault.status)
        return web.json_response(failure("openai", fault), status=fault.status)

    async def _upload(self, request: web.Request) -> web.Response:
        if fault := self.uploading():
            return self._refuse(fault)
        form = await request.post()
        assert form["purpose"] == "batch"
        data = form["file"].file.read()
        about = {"object": "file", "bytes": len(data), "created_at": 0, "filename": "batch.jsonl"}
        return web.json_response(
            about | {"id": self.store(data), "purpose": "batch", "status": "processed"}
        )

    async def _content(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.files[request.match_info["id"]], content_type="application/octet-stream"
        )

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        requests = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert len({one["body"]["model"] for one in requests}) == 1, "one model a batch"
        if fault := self.creating(requests):
            return self._refuse(fault)
        name = f"batch-{len(self.batches) + 1}"
        batch = {
            "id": name,
            "object": "batch",
            "created_at": 0,
            "status": "in_progress",
            "looks": 0,
            **body,
        }
        batch["request_counts"] = {"total": len(requests), "completed": 0, "failed": 0}
        self.batches[name] = batch
        if self.lost:
            self.lost = False
            request.transport.abort()
        return web.json_response(batch)

    async def _list(self, request: web.Request) -> web.Response:
        names = list(self.batches)[::-1]
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = [
            self.batches[name] for name in names[start : start + 2]
        ]  # small pages, to be turned
        more = start + 2 < len(names)
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return web.json_response({"object": "list", "data": page, "has_more": more, **ends})

    async def _look(self, request: web.Request) -> web.Response:
        if fault := self.looking():
            return self._refuse(fault)
        if request.match_info["id"] not in self.batches:
            return web.json_response(failure("openai", Fault(404, code="not_found")), status=404)
        batch = self.batches[request.match_info["id"]]
        batch["looks"] += 1
        if batch["status"] == "in_progress" and batch["looks"] > self.looks:
            self.finish(batch)
        return web.json_response(batch)

    def finish(self, batch: dict):
        """Answer the requests of a batch and write its files of results."""
        requests = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        batch["status"], _, code = self.ends(batch, requests).partition(":")
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": code, "message": "scripted"}]}
            return
        if batch["status"] in ("expired", "cancelled"):
            requests = requests[::2]
        random.Random(batch["id"]).shuffle(requests)
        found = {200: [], 0: []}
        for one in requests:
            call = parse("openai", one["body"], {})
            reply = self.answer(call)
            self.calls.append(call)
            self.keys.append(one["custom_id"])
            good = not isinstance(reply, Fault)
            reply = Reply(str(reply)) if isinstance(reply, str | int | float) else reply
            body = success(call, reply) if good else failure("openai", reply)
            response = {
                "status_code": 200 if good else reply.status,
                "request_id": "r",
                "body": body,
            }
            line = {"id": "x", "custom_id": one["custom_id"], "response": response, "error": None}
            found[200 if good else 0].append(line)
        counts = batch["request_counts"]
        counts["completed"], counts["failed"] = len(found[200]), len(found[0])
        for name, lines in (("output_file_id", found[200]), ("error_file_id", found[0])):
            if lines:
                lines = self.spoil([json.dumps(line, ensure_ascii=False) for line in lines])
                batch[name] = self.store("".join(line + "\n" for line in lines).encode())


def shown(call: Call) -> list[tuple[str, str]]:
    """The (id, text) of each fenced answer in a judge's prompt, in the order shown.

    One prompt has one nonce, that of its last fence; a fence with another is part of somebody's text.
    """
    nonces = re.findall(r'^</answer nonce="([^"\n]+)">$', call.prompt, re.MULTILINE) or [""]
    nonce = f'nonce="{re.escape(nonces[-1])}"'
    fence = rf'^<answer id="([^"\n]+)" {nonce}>\n(.*?)\n</answer {nonce}>$'
    return re.findall(fence, call.prompt, re.MULTILINE | re.DOTALL)


def is_judge(call: Call) -> bool:
    """Whether the prompt shows answers to be judged."""
    return bool(shown(call))


def judge_reply(call: Call, score) -> str:
    """The JSON of a judge whose opinion is score(text, slot), slot 0 the first shown, kept to 1..10."""
    scores = {name: score(text, slot) for slot, (name, text) in enumerate(shown(call))}
    scores = {name: round(min(10, max(1, value)), 1) for name, value in scores.items()}
    return json.dumps({"reason": "scripted", "scores": scores})


def demo_world(call: Call) -> str:
    """Answers with a hidden quality, 25 to 65 or for strong models 55 to 95, and judges who can read it."""

    def quality(text: str, slot: int = 0) -> int:
        found = re.search(r"(?:in|有) (\d+) (?:of 100 cases|次)", text)
        return int(found[1]) if found else 50

    if is_judge(call):
        return judge_reply(call, lambda text, slot: 1 + quality(text) * 0.09)
    if call.protocol == "reward":
        return " ".join(str(quality(message["content"]) / 100) for message in call.messages)
    luck = random.Random(f"{call.model}\n{call.prompt}")
    weak = re.search("mini|nano|flash|turbo|plus", call.model)
    strong = not weak and bool(re.search("max|gpt-4o|gpt-5", call.model))
    works = luck.randint(25, 65) + 30 * strong
    if not call.prompt.isascii():
        advice = luck.choice(["先从最简单的做法开始", "把步骤逐条写下来", "动手之前先量一量现状"])
        return f"{advice}，这样做一百次里大约有 {works} 次能够成功。"
    advice = luck.choice(
        ["Start with the simplest version", "Write the steps down", "Measure it first"]
    )
    return f"{advice}: it works in {works} of 100 cases."


def main() -> None:
    """Serve the demo world; the first line printed is the URL, then what to give --base-url."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--retry-after", default="")
    o = parser.parse_args()
    with (
        suppress(KeyboardInterrupt),
        Api(demo_world, o.latency, o.limit, o.port, o.retry_after) as api,
    ):
        api.engine.calls = api.engine.keys = deque(
            maxlen=0
        )  # nobody here looks at them, and they may be many
        print(api.url)
        print(f"openai:    --base-url {api.url}/v1")
        print(f"dashscope: --base-url {api.url}/api/v1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
