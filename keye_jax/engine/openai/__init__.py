"""The OpenAI interface without HTTP: requests from bodies, and bodies and streams from what an engine gives back.

| interface | reads | writes whole | writes a stream |
|---|---|---|---|
| `/v1/chat/completions` | `read_chat` | `completion_body` | `ChatStream` |
| `/v1/completions` | `read_completion` | `text_completion_body` | `CompletionStream` |
| `/v1/responses` | `read_responses` | `response_body` | `ResponseStream` |

A stream is a class that knows neither HTTP nor an event loop: `take(event)` returns the objects to send for one event
of an engine. Put together they are the whole body. `error_body` gives the status and the body of a failure.
"""

from keye_jax.engine.openai.asked import Asked
from keye_jax.engine.openai.errors import error_body, failure_kind
from keye_jax.engine.openai.read_chat import read_chat
from keye_jax.engine.openai.read_completion import read_completion
from keye_jax.engine.openai.read_responses import read_responses
from keye_jax.engine.openai.write_chat import ChatStream, completion_body
from keye_jax.engine.openai.write_completion import CompletionStream, text_completion_body
from keye_jax.engine.openai.write_responses import ResponseStream, response_body

__all__ = [
    "Asked",
    "ChatStream",
    "CompletionStream",
    "ResponseStream",
    "completion_body",
    "error_body",
    "failure_kind",
    "read_chat",
    "read_completion",
    "read_responses",
    "response_body",
    "text_completion_body",
]
