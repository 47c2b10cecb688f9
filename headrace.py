"""The `headrace` command: looks the verb up and imports only that verb's module, so that --help is instant."""

import importlib
import os
import sys

VERBS = {
    "export": ("export.cli", "write a checkpoint as an ONNX artifact"),
    "engine": ("export.tensorrt.cli", "compile an artifact for TensorRT"),
    "serve": ("serve.cli", "serve an artifact over HTTP"),
    "generate": ("runtime.commands.generate", "stream an answer to the terminal"),
    "eval": ("runtime.commands.evaluate", "perplexity of an artifact on a text, and its distance from another"),
    "bench": ("runtime.commands.bench", "prefill and decode speed, memory, fraction of the roofline"),
    "fit": ("runtime.commands.fit", "which precision, context and batch fit a device's memory, with the sums"),
    "verify": ("runtime.commands.verify", "repeat the receipt's tokens on the device that will serve"),
    "doctor": ("runtime.commands.doctor", "which devices can run a model here, and what the others need"),
    "key": ("serve.access.key_command", "make an API key for a server"),
    "inspect": ("runtime.commands.inspect_artifact", "dimensions, precision, files and receipt of an artifact"),
}


def usage() -> str:
    """The text of `headrace --help`."""
    rows = "\n".join(f"  {verb:10}{summary}" for verb, (_, summary) in VERBS.items())
    return f"usage: headrace VERB [...]\n\n{rows}\n\n`headrace VERB --help` lists the options of a verb.\n"


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 on anything the user can mend, with one line on standard error."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    verb = args[0]
    if verb not in VERBS:
        sys.stderr.write(f"headrace: no verb {verb!r}; one of {', '.join(VERBS)}\n")
        return 2
    if argv is None and verb == "serve":
        from serve.process.allocator import restart_tuned

        restart_tuned()
    return _run(verb, args[1:])


def _run(verb: str, args: list[str]) -> int:
    from runtime.errors import HeadraceError

    try:
        return int(importlib.import_module(VERBS[verb][0]).main(args))
    except HeadraceError as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.stderr.write(f"headrace {verb}: interrupted\n")
        return 130
    except BrokenPipeError:
        # `| head` has what it wanted. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # The machine's fault, not ours: permissions, a full disk, a file that went away.
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except MemoryError:
        message = "memory ran out; end other programs, or ask for less"
    sys.stderr.write(f"headrace {verb}: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
