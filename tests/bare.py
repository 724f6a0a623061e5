"""The bare SDK's side of the bench: `python tests/bare.py openai|dashscope URL CALLS IN_FLIGHT`.

The least that anybody would write: one client, a semaphore, `asyncio.gather`. Answers are thrown away."""

import asyncio
import sys


async def openai_calls(url: str, gather):
    import openai

    client = openai.AsyncOpenAI(
        base_url=url, api_key="none", http_client=openai.DefaultAioHttpClient()
    )
    async with client:
        await gather(
            lambda model, messages: client.chat.completions.create(model=model, messages=messages)
        )


async def dashscope_calls(url: str, gather):
    import aiohttp
    from dashscope import AioGeneration

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        where = {"session": session, "api_key": "none", "base_address": url}
        await gather(
            lambda model, messages: AioGeneration.call(model=model, messages=messages, **where)
        )


def gathering(calls: int, in_flight: int):
    """-> gather(call): await call(model, messages) so many times, two models in turn."""
    room = asyncio.Semaphore(in_flight)

    async def one(call, n: int):
        async with room:
            await call("ab"[n % 2], [{"role": "user", "content": f"Question {n // 2}?"}])

    async def gather(call):
        await asyncio.gather(*(one(call, n) for n in range(calls)))

    return gather


if __name__ == "__main__":
    provider, url, calls, in_flight = sys.argv[1:]
    all_calls = {"openai": openai_calls, "dashscope": dashscope_calls}[provider]
    asyncio.run(all_calls(url, gathering(int(calls), int(in_flight))))
