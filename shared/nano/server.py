"""An OpenAI-compatible server for the nano policy: `python -m shared.nano.server --port 8000`.

FastAPI speaks HTTP on the event loop; one engine thread computes. Shapes of requests and replies
follow vLLM, whose place it takes in the quick start and in tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from shared.errors import TirgenError
from shared.nano.engine import EngineBusyError, EngineDeadError
from shared.nano.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    JsonObject,
    LogprobListing,
    TokenizeChat,
    TokenizeText,
    usage,
)
from shared.nano.service import MAX_WAITING, Batch, Choice, NanoService
from shared.nano.text import PromptError

DEFAULT_MODEL = Path(__file__).parent / "weights"


def _event(body: JsonObject) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _completion_choice(
    body: CompletionRequest,
    prompt: list[int],
    index: int,
    part: Choice,
    listing: LogprobListing,
    *,
    first: bool = True,
) -> JsonObject:
    """One choice, whole or a stream's chunk of it; a chunk repeats the prompt only at first."""
    count = body.logprobs
    return {
        "index": index,
        "text": part.text,
        "logprobs": None if count is None else listing.completion(part.logprobs, count),
        "finish_reason": part.finish_reason,
        "stop_reason": part.stop_reason,
        "token_ids": list(part.token_ids) if body.return_token_ids else None,
        "prompt_token_ids": prompt if body.return_token_ids and first else None,
    }


def _chat_extras(body: ChatRequest, part: Choice, listing: LogprobListing) -> JsonObject:
    return {
        "logprobs": listing.chat(part.logprobs) if body.logprobs else None,
        "finish_reason": part.finish_reason,
        "stop_reason": part.stop_reason,
        "token_ids": list(part.token_ids) if body.return_token_ids else None,
    }


def create_app(server: NanoService, *, dev: bool = False) -> FastAPI:
    """The routes over one loaded model. The engine stops with the app.

    `dev`: also those by which a trainer gives it new weights, as vLLM has them in its dev mode.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.engine.close()

    app = FastAPI(title="tirgen nano", lifespan=lifespan, openapi_url=None)

    def refuse(error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return refuse(error)

    @app.exception_handler(PromptError)
    async def _prompt_error(_: Request, error: PromptError) -> JSONResponse:
        return refuse(ApiError(400, str(error), param="messages"))

    @app.exception_handler(EngineBusyError)
    async def _busy(_: Request, error: EngineBusyError) -> JSONResponse:
        message = f"{MAX_WAITING} requests are waiting already; try again later"
        return refuse(ApiError(503, message, kind="ServiceUnavailableError"))

    @app.exception_handler(EngineDeadError)
    async def _dead(_: Request, error: EngineDeadError) -> JSONResponse:
        return refuse(ApiError(500, "the engine has stopped", kind="InternalServerError"))

    @app.exception_handler(HTTPException)
    async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
        kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
        return refuse(ApiError(error.status_code, str(error.detail), kind=kind))

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return refuse(ApiError(400, message, param=where or None))

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if server.engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> JsonObject:
        card = {
            "id": server.name,
            "object": "model",
            "created": server.created,
            "owned_by": "tirgen",
            "root": server.name,
            "parent": None,
            "max_model_len": server.max_len,
        }
        return {"object": "list", "data": [card]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeChat | TokenizeText) -> JsonObject:
        server.check_model(body.model)
        if isinstance(body, TokenizeChat):
            ids = server.encode_chat(body)
        else:
            ids = server.encode(body.prompt, add_special_tokens=body.add_special_tokens)
        return {
            "count": len(ids),
            "max_model_len": server.max_len,
            "tokens": ids,
            "token_strs": [server.codec.tokenizer.id_to_token(i) for i in ids]
            if body.return_token_strs
            else None,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> JsonObject:
        server.check_model(body.model)
        unknown = [i for i in body.tokens if i not in server.codec.ids]
        if unknown:
            raise ApiError(400, f"Token id {unknown[0]} is out of vocabulary", param="tokens")
        return {"prompt": server.codec.decode(body.tokens, skip_special_tokens=False)}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        server.check_model(body.model)
        prompt = body.prompt
        if isinstance(prompt, str):
            prompt = server.encode(prompt, add_special_tokens=body.add_special_tokens)
        room = server.room(prompt, body.max_tokens)
        params = body.sampling(server.defaults, max_tokens=room, logprobs=body.logprobs)
        choices = body.n or 1
        batch = server.submit(prompt, params, choices, streams=bool(body.stream))
        listings = [LogprobListing(server.codec) for _ in range(choices)]
        head: JsonObject = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.name,
        }

        async def chunks() -> AsyncGenerator[str]:
            total, begun = 0, set[int]()
            async for index, update in batch.updates():
                total += len(update.token_ids)
                part = Choice(**vars(update))
                entry = _completion_choice(
                    body, prompt, index, part, listings[index], first=index not in begun
                )
                begun.add(index)
                yield _event({**head, "choices": [entry]})
            if body.stream_options and body.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": usage(len(prompt), total)})

        if body.stream:
            return _stream(batch, chunks())
        gathered = await batch.complete(request)
        entries = [
            _completion_choice(body, prompt, i, part, listings[i])
            for i, part in enumerate(gathered)
        ]
        total = sum(len(part.token_ids) for part in gathered)
        return JSONResponse({**head, "choices": entries, "usage": usage(len(prompt), total)})

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        server.check_model(body.model)
        prompt = server.encode_chat(body)
        room = server.room(prompt, body.max_completion_tokens or body.max_tokens)
        count = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling(server.defaults, max_tokens=room, logprobs=count)
        choices = body.n or 1
        batch = server.submit(prompt, params, choices, streams=bool(body.stream))
        listings = [LogprobListing(server.codec) for _ in range(choices)]
        head: JsonObject = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": server.name,
        }
        prompt_ids = prompt if body.return_token_ids else None

        async def chunks() -> AsyncGenerator[str]:
            head["object"] = "chat.completion.chunk"
            for index in range(choices):
                delta: JsonObject = {"role": "assistant", "content": ""}
                entry = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield _event({**head, "choices": [entry], "prompt_token_ids": prompt_ids})
            total = 0
            async for index, update in batch.updates():
                total += len(update.token_ids)
                extras = _chat_extras(body, Choice(**vars(update)), listings[index])
                delta = {"content": update.text}
                yield _event({**head, "choices": [{"index": index, "delta": delta, **extras}]})
            if body.stream_options and body.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": usage(len(prompt), total)})

        if body.stream:
            return _stream(batch, chunks())
        gathered = await batch.complete(request)
        entries = [
            {
                "index": index,
                "message": {"role": "assistant", "content": part.text},
                **_chat_extras(body, part, listings[index]),
            }
            for index, part in enumerate(gathered)
        ]
        total = sum(len(part.token_ids) for part in gathered)
        return JSONResponse(
            {
                **head,
                "choices": entries,
                "usage": usage(len(prompt), total),
                "prompt_token_ids": prompt_ids,
            }
        )

    if dev:
        _add_weight_updates(app, server)
    return app


def _add_weight_updates(app: FastAPI, server: NanoService) -> None:
    """vLLM's way of new weights: pause, reload from a folder, reset the cache, resume.

    Nothing is cached from one request to the next, so that the cache needs no reset.
    """

    @app.post("/pause")
    async def pause(mode: str = "abort") -> JsonObject:
        if mode != "wait":
            raise ApiError(400, "only /pause?mode=wait is supported", param="mode")
        await asyncio.to_thread(server.engine.pause)
        return {"status": "paused"}

    @app.post("/resume")
    async def resume() -> JsonObject:
        server.engine.resume()
        return {"status": "resumed"}

    @app.post("/reset_prefix_cache")
    async def nothing() -> Response:
        return Response(status_code=200)

    @app.post("/collective_rpc")
    async def collective_rpc(body: JsonObject) -> JsonObject:
        match body:
            case {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}:
                pass
            case _:
                raise ApiError(400, "only reload_weights with a weights_path is supported")
        try:
            await asyncio.to_thread(server.load, Path(folder))
        except TirgenError as error:
            raise ApiError(400, str(error)) from error
        return {"results": [None]}


def _stream(batch: Batch, chunks: AsyncGenerator[str]) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        # The status line is sent already, so a failure from here on is an event of the stream.
        try:
            async for chunk in chunks:
                yield chunk
        except EngineDeadError:
            yield _event(ApiError(500, "the engine has stopped").body())
        finally:
            batch.cancel()  # a client that left is not generated for
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; the address is the first line on standard output."""
    parser = argparse.ArgumentParser(prog="python -m shared.nano.server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="default: loopback only")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--fd", type=int, help="serve on this inherited listening socket instead")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face folder")
    parser.add_argument("--name", default="nano", help="model name in requests")
    parser.add_argument("--dev", action="store_true", help="take new weights: for a trainer")
    args = parser.parse_args(argv)
    try:
        app = create_app(NanoService(args.model, args.name), dev=args.dev)
        if args.fd is None:
            listener = socket.create_server((args.host, args.port))
        else:
            listener = socket.socket(fileno=args.fd)
    except TirgenError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"cannot listen on {args.host}:{args.port}: {error}\n")
        return 1
    host, port = listener.getsockname()[:2]
    sys.stdout.write(f"nano: http://{host}:{port}/v1\n")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
