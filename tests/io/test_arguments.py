import pytest

from clipdistill.io.arguments import Parser


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="program")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train")
    train.add_argument("--config")
    train.add_argument("overrides", nargs="*")
    commands.add_parser("report").add_argument("run")
    return parser


@pytest.mark.parametrize(
    "line",
    [
        "train a=1 b.c=[2,3] --config x",
        "train --config x a=1 b.c=[2,3]",
        "train a=1 --config x b.c=[2,3]",
    ],
)
def test_overrides_stand_anywhere(parser: Parser, line: str) -> None:
    args = parser.parse_args(line.split())
    assert args.overrides == ["a=1", "b.c=[2,3]"]
    assert args.config == "x"


@pytest.mark.parametrize(
    ("line", "strange"),
    [
        ("train a=1 --config x --confg=y b=2", "--confg=y"),
        ("train a=1 --config x word", "word"),
        ("report runs a=1", "a=1"),
    ],
)
def test_other_arguments_are_refused(
    parser: Parser, line: str, strange: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(line.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"program: unrecognized arguments: {strange} (see program --help)\n"
