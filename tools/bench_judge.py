"""What judge calls cost this process, and whether hung ones slow the others.

A server on this machine, in a process of its own, answers as a judge would after --seconds; this
process grades --calls proofs with --concurrency at once, as training does (fence, prompt, request,
reply, parser, and with --cache the reply on disk before it counts; seconds of a call count its wait
for a turn). Then 20 proofs are graded alone
and beside 100 calls that hang. The last line is JSON: CPU milliseconds of this process a call, wall
seconds, 50th and 95th percentile of a call's seconds, and the healthy calls' 95th percentile alone,
beside, and as a ratio.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import tempfile
import time

import numpy as np

from qed_jax import prompts
from qed_jax.chat import Endpoint, HttpChat
from qed_jax.records import Problem
from qed_jax.rewards import rubric

HUNG, HEALTHY = 100, 20
HANGS = "This one hangs."


def serve(port, seconds: float, reply_chars: int) -> None:
  """Answers every POST after `seconds`, those that hold HANGS never."""
  message = {"role": "assistant", "reasoning_content": "Let me see. " * (reply_chars // 12)}
  message["content"] = "Every item of the scheme is proved.\n\n<score>5</score>"
  body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
  body["usage"] = {"prompt_tokens": 2_000, "completion_tokens": reply_chars // 4}
  data = json.dumps(body).encode()
  head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"

  async def answer(reader, writer):
    try:
      while True:
        request = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(request.split(b"content-length:")[1].split(b"\r\n")[0])
        hangs = HANGS.encode() in await reader.readexactly(length)
        await asyncio.sleep(3_600 if hangs else seconds)
        writer.write(head.encode() + data)
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
      writer.close()

  async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    port.value = server.sockets[0].getsockname()[1]
    await server.serve_forever()

  asyncio.run(main())


def grader(url: str, concurrency: int, cache: str, proof_chars: int):
  """(chat, async (number, tail) -> seconds that a grade took)."""
  chat = HttpChat(
    Endpoint(url, "judge", hides_thinking=True),
    concurrency=concurrency,
    timeout=600.0,
    deadline=3_600.0,
    attempts=3,
    patience=600.0,
    outage_after=16,
    cache=cache,
  )
  problem = Problem(
    "p", "Prove that $x^2 + y^2 \\ge 2xy$. " * 20, rubric="3 points: a step.\n" * 100
  )
  sentence = "By induction we have $x_{n} < \\frac{1}{n}$, as was claimed. "
  template, style = prompts.load("judge"), rubric.STYLES["strict"]

  async def grade(number: int, tail: str = "") -> float:
    proof = f"{number} {sentence * (proof_chars // len(sentence))}{tail}"
    begin = time.perf_counter()
    found = await rubric.grade(
      problem, proof, chat, template=template, style=style, attempts=3, votes=1,
      aggregate="median", on_invalid="mask", max_tokens=10_000, temperature=1.0,
    )  # fmt: skip
    assert found.score == 5, found
    return time.perf_counter() - begin

  return chat, grade


async def throughput(url: str, arguments, cache: str) -> dict[str, float]:
  chat, grade = grader(url, arguments.concurrency, cache, arguments.proof_chars)
  await asyncio.gather(*(grade(-1 - n) for n in range(arguments.concurrency)))  # connections
  wall, cpu = time.perf_counter(), time.process_time()
  seconds = await asyncio.gather(*(grade(n) for n in range(arguments.calls)))
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  await chat.close()
  p50, p95 = np.percentile(seconds, [50, 95])
  figures = {"cpu_ms_a_call": 1e3 * cpu / arguments.calls, "wall_s": wall}
  return figures | {"p50_s": float(p50), "p95_s": float(p95)}


async def healthy(url: str, arguments, hung: int) -> list[float]:
  """Seconds of the healthy calls, with so many hung ones beside them."""
  chat, grade = grader(url, arguments.concurrency, "", arguments.proof_chars)
  waiting = [asyncio.create_task(grade(-1 - n, HANGS)) for n in range(hung)]
  await asyncio.sleep(1.0)
  found = []
  for _ in range(3):
    found += await asyncio.gather(*(grade(n) for n in range(HEALTHY)))
  for task in waiting:
    task.cancel()
  await asyncio.gather(*waiting, return_exceptions=True)
  await chat.close()
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--calls", type=int, default=2_048)
  parser.add_argument("--concurrency", type=int, default=256)
  parser.add_argument("--seconds", type=float, default=0.5, help="that the judge takes")
  parser.add_argument("--proof-chars", type=int, default=4_000, help="FineProofs' median")
  parser.add_argument("--reply-chars", type=int, default=10_000, help="of the judge's reasoning")
  parser.add_argument("--cache", action="store_true", help="keep the replies on disk")
  arguments = parser.parse_args()
  os.environ["NO_PROXY"] = "127.0.0.1"
  context = multiprocessing.get_context("spawn")
  port = context.Value("i", 0)
  server = context.Process(target=serve, args=(port, arguments.seconds, arguments.reply_chars))
  server.start()
  try:
    while not port.value:
      time.sleep(0.05)
    url = f"http://127.0.0.1:{port.value}/v1"
    with tempfile.TemporaryDirectory() as folder:
      cache = os.path.join(folder, "judge.jsonl") if arguments.cache else ""
      figures = asyncio.run(throughput(url, arguments, cache))
    seconds: dict[int, list[float]] = {0: [], HUNG: []}
    for _ in range(6):  # in turns, so that whatever else the machine does is shared
      for hung in seconds:
        seconds[hung] += asyncio.run(healthy(url, arguments, hung))
    alone, beside = (float(np.percentile(found, 95)) for found in seconds.values())
  finally:
    server.kill()
  figures |= {"healthy_p95_alone_s": alone, "healthy_p95_beside_s": beside}
  figures |= {"healthy_p95_ratio": beside / alone}
  for name, value in figures.items():
    print(f"{name:24} {value:.3f}")
  settings = {name: vars(arguments)[name] for name in ("calls", "concurrency", "cache")}
  print(json.dumps(settings | {name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
  main()
