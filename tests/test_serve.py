"""The serve mode: what it refuses, and the real program from its start to its end."""

import http.client
import importlib
import io
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from configs import quickstart
from memseg_jax.modes import serve
from tests import tiny

pytest.importorskip("uvicorn")


def refusal(capsys, *arguments):
    assert tiny.run("--mode=serve", *arguments) == 1
    return capsys.readouterr().err


@pytest.mark.usefixtures("quiet_entry")
def test_mistakes(capsys, tmp_path, monkeypatch):
    assert "--port x: expected a number from 0" in refusal(capsys, "--port=x")
    assert "expected a number from 0" in refusal(capsys, "--port=65536")
    assert "cannot listen at no.such.host.invalid" in refusal(capsys, "--host=no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1, port {port}" in refusal(capsys, f"--port={port}")
    here = "--port=0", f"--workdir={tmp_path / 'typo'}"
    assert "there is no checkpoint in" in refusal(capsys, *here)
    (tmp_path / "a.png").write_text("no picture")
    assert "a.png: not an image file" in refusal(capsys, *here, f"--input={tmp_path}")
    assert "no .jpg, .jpeg, .png file found" in refusal(capsys, *here, "--input=no/*.png")
    assert "config.serve.batch_size is 3" in refusal(capsys, "--config.serve.batch_size=3")

    def missing(name):
        raise ModuleNotFoundError("No module", name="uvicorn")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'package uvicorn: pip install "memseg_jax\[serve\]"'):
        serve._import_server()


def test_the_examples_of_the_quickstart_are_generated():
    examples = list(serve._examples(quickstart.get_config(), None))
    assert len(examples) == 6
    for example in examples:
        with Image.open(io.BytesIO(example)) as picture:
            assert picture.size == (96, 96)
    assert list(serve._examples(tiny.get_config(), None)) == []


@pytest.mark.slow
def test_the_real_program_answers_what_was_asked_before_it_ends(tmp_path):
    workdir = tiny.save_random_model(tmp_path / "run")
    picture = tiny.write(tmp_path / "examples" / "a.png", tiny.picture(0)[0])
    process = tiny.start(
        "--mode=serve", "--workdir", workdir, "--port=0", "--input", picture.parent,
        "--config.serve.batch_size=1",
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("serving at http://127.0.0.1:"), process.stderr.read()
        port = int(said.split(":")[2].split("/")[0])

        def ask(method, path, body=None):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()

        status, content = ask("POST", "/segment", picture.read_bytes())
        assert status == 200
        with Image.open(io.BytesIO(content)) as label:
            assert label.size == (32, 32)
            assert np.array(label).max() < 3
        assert ask("GET", "/examples/0") == (200, picture.read_bytes())
        # A picture that has to be compiled for first, so that the signal comes meanwhile.
        other = tiny.write(tmp_path / "b.png", tiny.picture(1, 30, 60)[0]).read_bytes()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, "POST", "/segment", other)
            while b'"in_flight":1' not in ask("GET", "/health")[1]:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert answer.result(120)[0] == 200
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "stopped; all that was asked is answered" in err
    finally:
        process.kill()
