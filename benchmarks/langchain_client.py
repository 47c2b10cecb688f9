"""LangChain's OpenAI chat model against a running server: whole replies, streams, a batch, asynchronous calls.

usage, in a virtual environment that has langchain-openai:
    python benchmarks/langchain_client.py http://127.0.0.1:8000 [--key KEY]

Prints a line for each check, then "ok". A failed check raises, with exit code 1. Not part of the tests, because
LangChain needs about twenty packages.
"""

import argparse
import asyncio
import json
import urllib.request

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

CONVERSATION = [
    SystemMessage("Answer briefly."),
    HumanMessage("Name a river."),
    AIMessage("The Nile."),
    HumanMessage("Another one?"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    asked = urllib.request.Request(f"{args.url}/v1/models", headers={"Authorization": f"Bearer {args.key}"})
    with urllib.request.urlopen(asked) as reply:
        name = json.load(reply)["data"][0]["id"]
    model = ChatOpenAI(
        model=name, base_url=f"{args.url}/v1", api_key=args.key, temperature=0, max_tokens=24, stream_usage=True
    )
    whole = model.invoke(CONVERSATION)
    assert whole.content and whole.usage_metadata["output_tokens"] <= 24
    print(f"invoke   {whole.usage_metadata['output_tokens']} tokens: {whole.content!r}")
    chunks = list(model.stream(CONVERSATION))
    streamed = "".join(chunk.content for chunk in chunks)
    assert streamed == whole.content, streamed
    print(f"stream   {len(chunks)} chunks, the same text")
    batch = model.batch([CONVERSATION] * 4)
    assert [answer.content for answer in batch] == [whole.content] * 4
    print("batch    4 at once, the same text")
    answers = asyncio.run(_gather(model))
    assert answers == [whole.content] * 3
    print("async    3 at once, the same text")
    print("ok")


async def _gather(model: ChatOpenAI) -> list[str]:
    answers = await asyncio.gather(*(model.ainvoke(CONVERSATION) for _ in range(3)))
    return [str(answer.content) for answer in answers]


if __name__ == "__main__":
    main()
