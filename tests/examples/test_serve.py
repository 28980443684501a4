"""The server of the examples, over real HTTP: its answers are those of `generate`, whatever else is in the batch."""

import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import socket
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT))
from examples import batching, serve  # noqa: E402
from examples.generate import generate  # noqa: E402
from examples.models import load  # noqa: E402

CHECKPOINT = ROOT / "tests" / "data" / "ck_modelopt"
PROMPTS = ([5, 17, 200], [9], [1, 2, 3, 4, 5, 6, 7], [250, 3])


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, dtype=jnp.float16)


@pytest.fixture(scope="module")
def engine(model):
    with contextlib.closing(batching.Engine(model, slots=2, capacity=32)) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(engine):
    app = serve.Server(engine, serve.Texts(), "small").app
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # what is asked before the server runs waits for it
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body) if not isinstance(body, bytes) else body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def expected(model):
    """The likeliest tokens, as the server writes them without a tokenizer."""

    def text(prompt):
        chunks = generate(model, np.asarray([prompt], np.int32), new_tokens=6, chunk=5)
        return "".join(f" {token}" for token in np.concatenate(list(chunks), axis=1)[0])

    return [text(prompt) for prompt in PROMPTS]


def test_sequences_that_share_a_batch_get_what_each_gets_alone(port, expected):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 6, "temperature": 0} for prompt in PROMPTS]
        answers = [json.loads(text) for _, text in pool.map(lambda body: ask(port, body), bodies)]
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"length"}
    assert answers[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_a_stream_has_the_same_text_in_events(port, expected):
    status, text = ask(port, {"prompt": list(PROMPTS[:2]), "max_tokens": 6, "temperature": 0, "stream": True})
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    choices = [json.loads(event)["choices"][0] for event in events]
    assert (status, done) == (200, "[DONE]")
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == expected[index]
        assert len(own) >= 6
        assert [choice["finish_reason"] for choice in own][-1] == "length"


def test_draws_depend_on_the_seed_and_not_on_the_batch(port):
    body = {"prompt": [7, 8], "max_tokens": 5, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    alone = json.loads(ask(port, body)[1])["choices"][0]["text"]
    several = json.loads(ask(port, body | {"prompt": [[7, 8], [1, 2, 3]]})[1])["choices"]
    assert several[0]["text"] == alone
    assert json.loads(ask(port, body | {"seed": 4})[1])["choices"][0]["text"] != alone


def test_a_stop_text_ends_a_sequence_before_it(port, expected):
    second = expected[0].split()[1]
    answer = json.loads(ask(port, {"prompt": PROMPTS[0], "temperature": 0, "stop": f" {second}"})[1])["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (f" {expected[0].split()[0]}", "stop")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is no JSON"),
        ([], "the body has type list"),
        ({}, "prompt is missing"),
        ({"prompt": "text"}, "no tokenizer.json; send token ids"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[1], "x", 2]}, "no tokenizer.json"),
        ({"prompt": [1, True]}, "neither a text nor a list of token ids"),
        ({"prompt": [256]}, "prompt has the token 256; it must lie in [0, 256)"),
        ({"prompt": [1], "max_tokens": 32}, "together they must be at most 32"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens is 0; it must be positive"),
        ({"prompt": [1], "max_tokens": True}, "max_tokens is True; it must be int"),
        ({"prompt": [1], "temperature": -1}, "temperature is -1; it must not be negative"),
        ({"prompt": [1], "top_p": 0}, "top_p is 0; it must lie in (0, 1]"),
        ({"prompt": [1], "stop": [""]}, "it must be a text that is not empty"),
        ({"prompt": [1], "n": 2}, "n is 2; this server computes 1 alone"),
        ({"prompt": [1], "min_p": 0.1}, "min_p is no field of a completion"),
    ],
)
def test_what_it_does_not_understand_is_refused_by_name(port, body, message):
    status, text = ask(port, body)
    assert status == 400
    assert message in json.loads(text)["error"]["message"]


def test_a_client_that_leaves_frees_its_slot(engine, port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": [1, 2], "max_tokens": 30, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    connection.getresponse().readline()
    connection.close()
    deadline = time.monotonic() + 60
    while any(engine.running) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(engine.running)


def test_requests_hear_of_the_end_of_the_engine(model):
    heard = []
    engine = batching.Engine(model, slots=2, capacity=32)
    requests = [batching.Request([1], 31, lambda token, reason: heard.append(reason)) for _ in range(2)]
    engine.submit(requests[0])
    engine.close()
    assert heard[-1] in ("stopped", "length")
    with pytest.raises(RuntimeError, match="the engine does not run: it was stopped"):
        engine.submit(requests[1])


def test_text_waits_for_whole_characters_and_possible_stops():
    pieces = {1: "a", 2: "ab", 3: "ab\ufffd", 4: "abé", 5: "abé.", 6: "abé.\n", 7: "abé.\nq"}
    writer = serve.Writer(lambda tokens: pieces[len(tokens)], ("\nq", ".\nx"))
    assert [writer.add(0) for _ in range(7)] == ["a", "b", "", "é", "", "", "."]
    assert (writer.stopped, writer.finish()) == (True, "")
    writer = serve.Writer(lambda tokens: "a\ufffd")
    assert (writer.add(0), writer.finish()) == ("a", "\ufffd")


def test_a_tokenizer_of_the_checkpoint_is_used():
    pytest.importorskip("tokenizers")
    texts = serve.Texts.of(str(ROOT / "tests" / "data" / "ck_q3"))
    assert texts.encode("t34 t69") == [34, 69]
    assert "t69" in texts.decode([34, 69])
