"""Compiles Triton kernels for sm_90 without a GPU and prints what each one uses, one JSON object a line.

The JIT makes a constant of an integer argument that is 1, such as the height of an image of one row, and a constant has
no methods of a tensor. So each kernel is compiled once more with every integer at 1: such a line has "ones", the names,
and "error", what the compiler said, or null.

Run by itself, since kernels that Triton's interpreter has claimed cannot be compiled:
`python tests/ops/aot.py [--without REGEX] [--each-one] [room ...]`, by default every room that has Triton kernels, and
every case; --each-one sets the integers to 1 one by one, in every case.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path


def compiled(kernel, signature, constants, options, even):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(cubin):
    """Registers, stack, shared and local bytes of a kernel, by the cuobjdump that comes with Triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [folder / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def integers(kernel, signature):
    """The arguments that the JIT makes constants of where they are 1."""
    free = {p.name for p in kernel.params if not p.do_not_specialize}
    return [n for n, kind in signature.items() if n in free and re.fullmatch(r"[iu]\d+", kind)]


def at_one(names, kernel, signature, constants, options, even):
    """What the compiler says where these arguments are 1, or None."""
    try:
        compiled(
            kernel,
            signature | dict.fromkeys(names, "constexpr"),
            constants | dict.fromkeys(names, 1),
            options,
            [n for n in even if n not in names],
        )
    except Exception as err:  # whatever the compiler raises is the answer
        while err.__cause__ is not None:  # the outer ones show the lines that led there
            err = err.__cause__
        return f"{type(err).__name__}: {str(err).splitlines()[-1]}"
    return None


def main(rooms, without, each):
    import triton

    seen = set()

    for room in rooms:
        name = f"poisonshield.ops.{room}.triton_kernels"
        if importlib.util.find_spec(name) is None:
            continue
        for case, kernel, signature, constants, options, even in importlib.import_module(name).aot_cases():
            if without and re.search(without, case):
                continue
            k = compiled(kernel, signature, constants, options, even)
            ptx = k.asm["ptx"]
            facts = {
                "triton": triton.__version__,
                "room": room,
                "case": case,
                "cubin": len(k.asm["cubin"]),
                "target": re.search(r"\.target (\w+)", ptx)[1],
                "barriers": ptx.count("bar.sync") + ptx.count("barrier.sync"),
                "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]", ptx)),
                "spills": ptx.count("st.local"),
            } | resources(k.asm["cubin"])
            print(json.dumps(facts), flush=True)
            names = integers(kernel, signature)
            if not names or (not each and kernel.__name__ in seen):
                continue
            seen.add(kernel.__name__)
            for ones in [[n] for n in names] if each else [names]:
                error = at_one(ones, kernel, signature, constants, options, even)
                print(json.dumps({"room": room, "case": case, "ones": ones, "error": error}), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels of the interpreter cannot be compiled"
    from poisonshield.ops.dispatch import rooms

    asked = argparse.ArgumentParser()
    asked.add_argument("rooms", nargs="*", default=rooms())
    asked.add_argument("--without", help="cases whose names match are left out")
    asked.add_argument("--each-one", action="store_true", help="set integers to 1 one by one, in every case")
    given = asked.parse_args()
    main(given.rooms, given.without, given.each_one)
