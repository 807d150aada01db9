"""How errors reach a user: in a line where one will do."""

import pytest
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from syncbn.errors import LONGEST, describe_error, one_line

OWN_CODE = """
def own_callback():
    raise KeyError("images")

def calls(library):
    library()
"""


def raised(function, *arguments):
    with pytest.raises(Exception) as error:
        function(*arguments)
    value = error.value
    value.__traceback__ = value.__traceback__.tb_next  # without this file, which is a user's own, too
    return value


@pytest.fixture
def own_code(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN_CODE)
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    return names


def test_an_error_of_the_users_own_code_shows_where_it_lies(own_code):
    text = describe_error(raised(own_code["own_callback"]))
    assert text.splitlines()[0].startswith("Traceback") and "mine.py" in text
    assert text.splitlines()[-1] == "syncbn: error: KeyError: 'images'"


def test_a_fault_that_nobody_foresaw_shows_all_of_it(monkeypatch):
    assert describe_error(ZeroDivisionError("ours")) is None
    assert describe_error(ValueError("two\nlines")) == "syncbn: error: two lines"
    assert describe_error(MisconfigurationException("as it is")) == "syncbn: error: as it is"
    monkeypatch.setenv("RANK", "3")
    assert describe_error(ValueError("x")) == "syncbn: error (rank 3): x"
    monkeypatch.setenv("SYNCBN_TRACEBACK", "1")
    assert describe_error(ValueError("x")) is None


def test_a_worker_that_the_system_ended_is_one_line():
    error = TypeError("unsupported callable")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert describe_error(error) == (
        "syncbn: error: DataLoader worker (pid 7) is killed by signal: Killed."
        " Perhaps the machine ran out of memory (dmesg says so): with fewer workers less is needed."
    )


def test_long_messages_of_libraries_are_cut():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int)
    error = raised(parser.parse_args, [f"--number={'x' * 2 * LONGEST}"])
    text = describe_error(error)
    assert len(text) < LONGEST + 100 and text.endswith("(SYNCBN_TRACEBACK=1 shows all of it)")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, "many", "number: expected float, not many"),
        (int | float | None, "many", "number: expected int or float or null, not many"),
    ],
    ids=str,
)
def test_lists_of_what_a_value_is_not_become_the_types_that_it_may_have(kind, value, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=kind)
    message = one_line(str(raised(parser.parse_args, [f"--number={value}"])))
    assert message == expected and "Subtypes" not in message
