"""A server with OpenAI's API, in which `model` is a composition and every request has its own, in one batch.

    request -> api -> service (a thread beside) -> scheduler (the thread of the model) -> api -> tokens

settings.py   limits and options                   scheduler.py  rows join and leave the running batch
protocol.py   what clients may send                responses.py  the forms of what they are told
names.py      which compositions they may name     prefix.py     keys and values of prompts that begin alike
service.py    from a request to its rows           shelf.py      which adapters stay in memory
preparing.py  its tokens, checked                  metrics.py    figures for Prometheus
answers.py    from tokens to OpenAI's objects      speaking.py   what rows say, gathered or streamed
ticket.py     one row on its way, and what it is told
api.py        the endpoints                        guard.py      keys, sizes and queue, before a body is read
failures.py   errors in OpenAI's form              server.py     the process: sockets, signals
page.py       the page of `--ui` and what it asks

Needs the extra `lora-rt[serve]`: FastAPI, uvicorn, sse-starlette, prometheus-client. Only api.py, guard.py,
speaking.py, failures.py, page.py and server.py know HTTP.
"""
