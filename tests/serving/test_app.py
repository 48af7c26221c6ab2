"""What is answered over HTTP: results, mistakes, limits; over a model that computes nothing."""

import io
import json
import re
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.serving.server import PATIENCE, Blocked, FakeEngine, ask, png, running, wait_until

pytest.importorskip("starlette")

IMAGE = np.zeros((4, 5, 3), np.uint8)
IMAGE[:, 3:] = 120
FILE = png(IMAGE)
LIMITS = {"queue": 3, "seconds": 30.0, "max_megabytes": 0.05, "max_megapixels": 0.01}


@pytest.fixture(scope="module")
def server():
    """With small limits."""
    with running(FakeEngine(**LIMITS), examples=[FILE]) as server:
        yield server


def segments(content):
    return [(x["name"], x["pixels"], x["confidence"]) for x in content["segments"]]


def bomb(width, height):
    """A PNG of a few bytes whose header claims many pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# ---- Results ------------------------------------------------------------------------------------


def test_all_forms_of_a_result(server):
    label = np.zeros((4, 5), np.uint8)
    label[:, 3:] = 1
    status, headers, content = ask(server, "POST", "/segment", FILE)
    assert (status, headers["content-type"]) == (200, "image/png")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(content))), label)
    status, _, content = ask(server, "POST", "/segment?format=values", FILE)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(content)))[..., 0], label)
    for form in ("polygons", "rle"):
        status, _, content = ask(server, "POST", f"/segment?format={form}", FILE)
        assert (status, segments(content)) == (200, [("ground", 12, 0.75), ("box", 8, 0.75)])


def test_a_form_as_browsers_and_curl_send_it(server):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../etc/passwd"\r\n'
        b"Content-Type: image/png\r\n\r\n" + FILE + b"\r\n--x--\r\n"
    )
    kind = {"content-type": "multipart/form-data; boundary=x"}
    status, _, content = ask(server, "POST", "/segment?format=rle", body, kind)
    assert (status, len(segments(content))) == (200, 2)
    wrong = body.replace(b'name="image"', b'name="photo"')
    status, _, content = ask(server, "POST", "/segment", wrong, kind)
    assert (status, content) == (400, {"error": 'the form has no file "image"'})
    status, _, content = ask(server, "POST", "/segment", body[:60], kind)
    assert status == 400


def test_a_pixel(server):
    status, _, content = ask(server, "POST", "/look?row=3&column=4", FILE)
    assert (status, content["row"], content["column"]) == (200, 3, 4)
    assert [x["name"] for x in content["classes"]] == ["box", "ground", "disc"]
    for query in ("row=4&column=0", "row=0&column=5", "row=-1&column=0", "row=1", "row=x&column=0"):
        status, _, content = ask(server, "POST", f"/look?{query}", FILE)
        assert status == 400, query
        assert "row" in content["error"]


def test_what_the_server_says_about_itself(server):
    status, _, content = ask(server, "GET", "/model")
    assert status == 200
    assert content["classes"][1] == {"class_id": 1, "name": "box", "color": [220, 40, 40]}
    assert (content["max_megabytes"], content["max_megapixels"]) == (0.05, 0.01)
    assert ask(server, "GET", "/health")[::2] == (200, {"status": "ok", "in_flight": 0})
    assert ask(server, "GET", "/examples/0")[::2] == (200, FILE)
    assert ask(server, "GET", "/examples/1")[0] == 404


def test_metrics():
    with running(FakeEngine()) as server:
        for _ in range(2):
            ask(server, "POST", "/segment", FILE)
        ask(server, "POST", "/segment", b"x")
        ask(server, "GET", "/made_up_by_a_client")
        status, headers, content = ask(server, "GET", "/metrics")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/plain")
    lines = content.decode().splitlines()
    for line in (
        'memseg_requests_total{route="/segment",status="200"} 2.0',
        'memseg_requests_total{route="/segment",status="400"} 1.0',
        'memseg_requests_total{route="other",status="404"} 1.0',
        'memseg_request_seconds_count{route="/segment"} 3.0',
        "memseg_requests_in_flight 0.0",
    ):
        assert line in lines


def test_the_description_is_of_what_there_is(server):
    _, _, api = ask(server, "GET", "/openapi.json")
    offered = {
        (method.lower(), route.path)
        for route in server.app.routes
        for method in route.methods - {"HEAD"}
    }
    pages = {"/", "/docs", "/openapi.json", "/examples/{number:int}"}
    described = {(m, path) for path, methods in api["paths"].items() for m in methods}
    assert described == {x for x in offered if x[1] not in pages and not x[1].startswith("/page/")}
    (form,) = api["paths"]["/segment"]["post"]["parameters"]
    assert form["schema"]["enum"] == ["png", "values", "polygons", "rle"]


# ---- Mistakes and limits ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "answer"),
    [
        (b"", 400, "its body is empty"),
        (b"no picture", 400, "not an image file"),
        (FILE[:50], 400, "truncated or damaged"),
        (bytes(50001), 413, "larger than 0.05 MB"),
        (bomb(101, 100), 413, "has 101x100 pixels; at most 0.01 megapixels"),
        (bomb(2**31 - 1, 2**31 - 1), 413, "far too large"),
        (bomb(9999, 1), 400, "truncated or damaged"),
        (b"\x80\x04\x95\x10.", 400, "not an image file"),  # a pickle
    ],
    ids=["empty", "text", "truncated", "long", "large", "bomb", "no_pixels", "pickle"],
)
def test_what_is_no_picture_or_too_much(server, body, status, answer):
    found, _, content = ask(server, "POST", "/segment", body)
    assert (found, answer in content["error"]) == (status, True), content
    assert ask(server, "POST", "/segment", FILE)[0] == 200


def test_a_picture_of_one_row_is_not_padded_to_many_times_its_area():
    with running(FakeEngine()) as server:
        status, _, content = ask(server, "POST", "/segment", png(np.zeros((1, 16385), np.uint8)))
    assert (status, "16384 a side" in content["error"]) == (413, True)


def test_a_body_without_a_length_is_counted(server):
    chunks = iter([bytes(10000)] * 100)
    status, _, content = ask(server, "POST", "/segment", chunks)
    assert (status, "larger than" in content["error"]) == (413, True)


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/examples/../page"]
)
def test_no_path_of_a_request_is_opened(server, path):
    assert ask(server, "GET", path)[0] == 404


def test_methods_and_parameters(server):
    assert ask(server, "GET", "/segment")[0] == 405
    status, _, content = ask(server, "POST", "/segment?format=pickle", FILE)
    assert status == 400
    assert "expected png, values, polygons, rle" in content["error"]


def test_a_full_queue_answers_at_once():
    engine = Blocked(**LIMITS)
    with running(engine) as server, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, server, "POST", "/segment", FILE) for _ in range(3)]
        in_flight = lambda: ask(server, "GET", "/health")[2]["in_flight"]  # noqa: E731
        wait_until(lambda: in_flight() == 3)
        status, headers, content = ask(server, "POST", "/segment", FILE)
        assert (status, headers["retry-after"]) == (503, "1")
        assert content == {"error": "3 requests are waiting"}
        engine.go.set()
        assert [x.result(PATIENCE)[0] for x in waiting] == [200] * 3
        assert ask(server, "POST", "/segment", FILE)[0] == 200
    assert sum(engine.batches) == 4


def test_what_takes_too_long_is_answered_and_leaves_the_queue():
    engine = Blocked(seconds=0.5)
    with running(engine) as server:
        for _ in range(2):
            status, headers, content = ask(server, "POST", "/segment", FILE)
            assert (status, headers["retry-after"]) == (503, "5")
            assert "no result within 0.5 s" in content["error"]
        engine.go.set()
        wait_until(lambda: ask(server, "GET", "/health")[2]["in_flight"] == 0)
    assert sum(engine.batches) <= 1  # the one that had begun


def test_a_client_that_sends_nothing_holds_its_place_for_so_long():
    with (
        running(FakeEngine(queue=1, seconds=0.5)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as slow,
    ):
        slow.sendall(b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 503")
        wait_until(lambda: ask(server, "GET", "/health")[2]["in_flight"] == 0)


def test_a_picture_that_the_model_cannot_do_fails_alone():
    class Picky(Blocked):
        def segment(self, image):
            if image[0, 0, 0] == 66:
                raise ValueError("a secret of the model")
            return super().segment(image)

    engine = Picky()
    bad = png(np.full_like(IMAGE, 66))
    with running(engine) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, server, "POST", "/segment", FILE)
        assert engine.begun.wait(PATIENCE)
        rest = [pool.submit(ask, server, "POST", "/segment", x) for x in (FILE, bad, FILE)]
        wait_until(lambda: ask(server, "GET", "/health")[2]["in_flight"] == 4)
        wait_until(lambda: len(server.batcher._waiting) == 3)
        engine.go.set()
        answers = [x.result(PATIENCE) for x in (first, *rest)]
        assert [x[0] for x in answers] == [200, 200, 500, 200]
        assert "secret" not in json.dumps(answers[2][2])
        assert ask(server, "POST", "/segment", FILE)[0] == 200
    assert engine.batches[:2] == [1, 3]


def test_none_of_200_requests_of_16_clients_is_lost():
    engine = FakeEngine()
    files = [png(np.full((6, 6 + n % 3, 3), n, np.uint8)) for n in range(200)]
    with running(engine) as server, ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda file: ask(server, "POST", "/segment?format=rle", file), files)
        )
    assert [x[0] for x in answers] == [200] * 200
    for number, (_, _, content) in enumerate(answers):
        assert content["width"] == 6 + number % 3
        assert content["segments"][0]["class_id"] == number // 100
    assert sum(engine.batches) == 200


# ---- Who may ask --------------------------------------------------------------------------------


def test_pages_of_other_origins(server):
    own = {"origin": f"http://127.0.0.1:{server.port}"}
    assert ask(server, "POST", "/segment", FILE, own)[0] == 200
    for origin in ("https://example.org", "null", f"http://127.0.0.1:{server.port + 1}"):
        status, headers, content = ask(server, "POST", "/segment", FILE, {"origin": origin})
        assert (status, "origin" in content["error"]) == (403, True)
        assert "access-control-allow-origin" not in headers
    with running(FakeEngine(origin="https://example.org/")) as other:
        asked = {"origin": "https://example.org"}
        status, headers, _ = ask(other, "POST", "/segment", FILE, asked)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://example.org")
        assert ask(other, "POST", "/segment", FILE, {"origin": "https://a.org"})[0] == 403


def test_names_that_others_gave_this_machine(server):
    assert ask(server, "GET", "/model", headers={"host": "localhost:80"})[0] == 200
    assert ask(server, "GET", "/model", headers={"host": "evil.example.org"})[0] == 421
    with running(FakeEngine(), bound="0.0.0.0") as other:
        assert ask(other, "GET", "/model", headers={"host": "server.example.org"})[0] == 200


def test_the_page_asks_no_other_host_and_runs_nothing_inline(server):
    paths = [x.path for x in server.app.routes if x.path.startswith("/page/")]
    assert {"/page/page.js", "/page/style.css", "/page/icon.svg"} <= set(paths)
    for path in ("/", "/docs", *paths):
        status, headers, content = ask(server, "GET", path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        hosts = set(re.findall(rb"https?://([^/\s\"'`$]+)", content))
        assert hosts <= {b"www.w3.org"}, (path, hosts)  # the name of SVG's namespace
        assert not re.search(rb"<script(?! type=\"module\" src=)|\son\w+=| style=|<style", content)


def test_stopping_answers_what_was_asked():
    engine = Blocked()
    answer = []
    with running(engine) as server:
        asking = threading.Thread(
            target=lambda: answer.append(ask(server, "POST", "/segment", FILE)[0])
        )
        asking.start()
        assert engine.begun.wait(PATIENCE)
    asking.join(PATIENCE)
    assert answer == [200]
