"""medusa-serve with OpenAI's client: ``python openai_client.py http://127.0.0.1:8000/v1 "Why is the sky blue?"``

The key, where the server wants one, is in OPENAI_API_KEY.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

url, question = sys.argv[1:]
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": question}],
    max_tokens=128,
    stream=True,
    stream_options={"include_usage": True},
)
for part in stream:
    if part.choices:
        print(part.choices[0].delta.content or "", end="", flush=True)
    if part.usage:
        print(f"\n{part.usage.completion_tokens} tokens", file=sys.stderr)
