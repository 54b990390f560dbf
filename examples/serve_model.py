"""Serve the GPT of `train_fsdp2.py`, and go over to each newer checkpoint while requests go on.

    python examples/serve_model.py --uri s3://bucket/run --save-to s3://bucket/kept
    curl -d "import asyncio" localhost:8080/score   # how well the model knows this text
    curl -X POST localhost:8080/save                # keeps a copy of what is being served
    curl localhost:8080/health                      # what is served; how late the loop has been

A newer checkpoint is loaded into a model of its own, which then takes the other's place: every
answer comes from one checkpoint. One that cannot be loaded is logged, and tried again.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator

import torch
from aiohttp import web
from delays import Delays
from gpt import CONTEXT, GPT

import s3dcp

# Path style suits a local endpoint (AWS_ENDPOINT_URL); a poll that fails is followed by another.
S3_CONFIG = s3dcp.S3ClientConfig(force_path_style=True, max_attempts=3, retry_timeout_s=10.0)

log = logging.getLogger("serve_model")


@torch.inference_mode()
def mean_loss(model: GPT, text: torch.Tensor) -> float:
    """Return the mean cross-entropy, in nats, of each byte given those before it."""
    return float(model(text[None, :-1], text[None, 1:]))


class Service:
    """The model that is being served, and what is done with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.serving: tuple[s3dcp.CheckpointInfo, GPT] | None = None
        self.delays = Delays()

    async def reload(self) -> None:
        """Go over to the newest complete checkpoint, unless it is there already."""
        newest = await asyncio.to_thread(s3dcp.latest, self.args.uri, s3client_config=S3_CONFIG)
        if newest is None or (self.serving and newest == self.serving[0]):
            return
        model = await asyncio.to_thread(GPT)  # aside: the one that is served stays as it is
        state = {"training": {"model": model.state_dict()}}  # the optimizer's is not fetched
        await s3dcp.aload(state, newest.uri, s3client_config=S3_CONFIG)
        self.serving = newest, model
        log.info("serving %s", newest.uri)

    async def follow(self) -> None:
        """Reload for ever."""
        while True:
            try:
                await self.reload()
            except Exception as exc:  # noqa: BLE001 - whatever it is, requests are answered
                log.warning("not reloaded: %s", exc)
            await asyncio.sleep(self.args.poll_s)

    def served(self) -> tuple[s3dcp.CheckpointInfo, GPT]:
        """Return the checkpoint and model for one request, which keeps them to its end."""
        if self.serving is None:
            raise web.HTTPServiceUnavailable(text=f"no checkpoint under {self.args.uri} yet\n")
        return self.serving

    async def score(self, request: web.Request) -> web.Response:
        """Answer with the model's loss on the text that was sent, or its beginning."""
        checkpoint, model = self.served()
        text = torch.tensor(list((await request.read())[: CONTEXT + 1]))
        if len(text) < 2:
            raise web.HTTPBadRequest(text="send some text\n")
        loss = await asyncio.to_thread(mean_loss, model, text)  # computing is no work for a loop
        return web.json_response({"checkpoint": checkpoint.uri, "loss": loss})

    async def save(self, _: web.Request) -> web.Response:
        """Save what is being served; requests and reloads go on."""
        checkpoint, model = self.served()
        uri = f"{self.args.save_to}/{checkpoint.uri.rpartition('/')[2]}"
        state = {"training": {"model": model.state_dict()}}
        try:
            await s3dcp.asave(state, uri, s3client_config=S3_CONFIG)
        except s3dcp.S3Exception as exc:
            raise web.HTTPBadGateway(text=f"{exc}\n") from exc
        return web.json_response({"checkpoint": checkpoint.uri, "saved": uri})

    async def health(self, _: web.Request) -> web.Response:
        """Tell what is being served, and how late the loop has been since this was last asked."""
        uri = self.serving[0].uri if self.serving else None
        return web.json_response({"checkpoint": uri, **self.delays.take()})

    async def run_beside(self, _: web.Application) -> AsyncIterator[None]:
        """Follow and watch for as long as the server runs; a load under way is cancelled."""
        beside = [asyncio.create_task(self.follow()), asyncio.create_task(self.delays.watch())]
        yield
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--uri", required=True, help="where checkpoints come: s3://bucket/prefix")
    parser.add_argument("--save-to", required=True, help="where copies go, on demand")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--poll-s", type=float, default=10.0, help="seconds between two looks")
    logging.basicConfig(level=logging.INFO)
    sys.setswitchinterval(0.001)  # what computes lets the loop go on after 1 ms, and not after 5
    service = Service(parser.parse_args())
    app = web.Application()
    app.cleanup_ctx.append(service.run_beside)
    app.router.add_get("/health", service.health)
    app.router.add_post("/score", service.score)
    app.router.add_post("/save", service.save)
    web.run_app(app, host="127.0.0.1", port=service.args.port, access_log=None)
