"""Progress bars: on a terminal, and nowhere else."""

import io
import logging
import sys

from memseg_jax.runtime import bars, distributed


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Puts one in the place of stderr; no fixture, as pytest exchanges stderr after those."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    shown_on = terminal(monkeypatch)
    with bars.bar(4, "checking val", "image") as bar:
        bar.update()
        bar.refresh()
        shown = shown_on.getvalue()
    assert "checking val:  25%" in shown
    assert "1/4 [" in shown
    assert shown_on.getvalue().split("\r")[-1].strip() == ""  # nothing stays


def test_a_log_file_and_another_process_get_nothing(monkeypatch, capsys):
    with bars.bar(4, "checking val", "image") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
    shown_on = terminal(monkeypatch)
    monkeypatch.setattr(distributed, "is_primary", lambda: False)
    with bars.bar(4, "checking val", "image") as bar:
        bar.update()
    assert shown_on.getvalue() == ""


def test_lines_of_the_log_stand_on_their_own(monkeypatch):
    shown_on = terminal(monkeypatch)
    handler = logging.StreamHandler(shown_on)
    bars.write_above(handler)
    with bars.bar(4, "checking val", "image") as bar:
        bar.refresh()
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
    assert "\ra line\n" in shown_on.getvalue()
