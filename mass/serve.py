"""mass-adapt serve: answer problems over HTTP (mass/api.py), for this machine alone unless there is a token."""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from mass.errors import MassError
from mass.kit import build_kit
from mass.wanted import plan

TOKEN_VARIABLE = "MASS_TOKEN"


def main(argv: Sequence[str]) -> int:
    """`mass-adapt serve`. Returns the exit code: 0, 2 for what the user has to mend, or 130 after Ctrl-C."""
    args = _parser().parse_intermixed_args(argv)
    try:
        _run(args)
        return 0
    except MassError as error:
        print(f"mass-adapt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> None:
    try:
        import uvicorn

        from mass.api import Limits, make_app
    except ModuleNotFoundError as error:
        raise MassError(
            f"serve needs {error.name}, which is not installed: pip install 'mass[serve]'"
        ) from None
    for option in ("batch", "queue", "max_body"):
        if getattr(args, option) < 1:
            raise MassError(f"--{option.replace('_', '-')} {getattr(args, option)}: it wants 1 or more")
    for option in ("window", "timeout"):
        if not 0 <= getattr(args, option) < float("inf"):
            raise MassError(f"--{option} {getattr(args, option)}: it wants a number of 0 or more")
    token = _token(args)
    wanted = plan(args.run, args.model, args.settings)
    method = args.method or wanted.default_method
    wanted.method(method)
    name = args.name or _name(args)
    if ":" in name:
        raise MassError(f"--name {name}: without a colon, which stands before the method")
    listening = _listen(args.host, args.port)
    kit = build_kit(wanted)
    limits = Limits(args.max_body, args.timeout, args.queue)
    app = make_app(
        kit,
        name,
        method,
        batch=args.batch,
        window=args.window / 1000,
        limits=limits,
        token=token,
        host=args.host,
        threads=wanted.recipe.run.threads,
    )
    host, port = listening.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"mass-adapt: {name} at http://{where}:{port}/v1 (method {method}); Ctrl-C ends it when what is under way is answered, twice at once", file=sys.stderr, flush=True)  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(args.timeout) + 1)
    uvicorn.Server(config).run(sockets=[listening])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mass-adapt serve",
        description="Answer problems over HTTP, by OpenAI's chat API; the method is a suffix of the model's name.",
        epilog=f"A token is read from --token-file or ${TOKEN_VARIABLE}; one is required when --host is not this machine alone.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run", metavar="FOLDER", help="as for mass-adapt: a run, one of its steps, or a PEFT adapter"
    )
    parser.add_argument("--model", help="as for mass-adapt: a bare model, or the PEFT adapter's base")
    parser.add_argument(
        "--method", help="of the bare model name; default: mass where there is a scorer, else quest"
    )
    parser.add_argument("--name", help="the model's name; default: that of the run's folder or of the model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0: any free one (8000)")
    parser.add_argument(
        "--token-file", metavar="F", help="file that holds the token which requests must carry"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="T", help="problems adapted together (8)")
    parser.add_argument(
        "--window", type=float, default=20, metavar="MS", help="how long a problem waits for others (20)"
    )
    parser.add_argument(
        "--queue", type=int, default=256, metavar="N", help="problems that may wait; more get 429 (256)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds a request may take; then 504 (300)"
    )
    parser.add_argument(
        "--max-body", type=int, default=1 << 18, metavar="B", help="bytes of a request; more get 413 (262144)"
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="a recipe key")
    return parser


def _token(args: argparse.Namespace) -> str | None:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if args.token_file is not None:
        try:
            token = Path(args.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MassError(f"--token-file {args.token_file} cannot be read ({error})") from None
        if not token:
            raise MassError(f"--token-file {args.token_file} is empty")
    if not token and not _loopback(args.host):
        raise MassError(
            f"--host {args.host} can be reached from other machines: set a token, by --token-file FILE or {TOKEN_VARIABLE}"
        )
    return token or None


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(args: argparse.Namespace) -> str:
    """The folder's or the model's own name: `demo` of checkpoints/demo (and of one of its steps)."""
    if args.run is None:
        return str(args.model).rstrip("/").rpartition("/")[2].replace(":", "-")
    folder = Path(args.run).expanduser().resolve()
    return (folder.parent if folder.name.startswith("step_") else folder).name.replace(":", "-")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise MassError(f"--host {host} --port {port}: cannot be listened at ({error})") from None
