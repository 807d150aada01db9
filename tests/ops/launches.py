"""Counts what would be launched on a GPU: the package's kernels, and every operator that is more than bookkeeping."""

import os
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.collectives import reduction as distributed
from syncbn.functional import exchange
from syncbn.ops import max_pool, native, triton_passes

# Allocate, or give memory another name.
_BOOKKEEPING = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "unbind",
    "unsqueeze",
    "view",
}


def _replace_the_language_once_a_kernel():
    """Triton's interpreter replaces its language's functions anew in each call of a device function: half its time.

    Within a kernel they are replaced already. Of a private function of Triton's: without it, tests are only slower.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope is None:
        return

    def replace_where_it_is_not(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return replace(fn) if any(tl.core.is_builtin(language.load) for language in languages) else scope()

    interpreter._patch_lang = replace_where_it_is_not


if os.environ.get("TRITON_INTERPRET") == "1":  # in a process of its own and, as this file is imported, in its ranks
    _replace_the_language_once_a_kernel()


@contextmanager
def passes_for_gpus():
    """Takes every tensor for one on a GPU: kernels process it, and nobody may read its numbers."""
    with (
        mock.patch.object(native, "takes", lambda x: False),
        mock.patch.object(triton_passes, "takes", lambda x: x.is_floating_point()),
        mock.patch.object(distributed, "may_be_read", lambda numbers: False),
        mock.patch.object(exchange, "may_be_read", lambda numbers: False),
    ):
        yield


class Launches(TorchDispatchMode):
    """Counts inside the `with` block, backward included."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()
        self.in_kernel = False

    def __enter__(self):
        self.patches = [
            mock.patch.object(module, "_kernels", partial(self._counted, module._kernels))
            for module in (triton_passes, max_pool)
        ]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def _counted(self, kernels):
        return _Counted(kernels(), self)

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket).split(".")[-1].rstrip("_")
        if name not in _BOOKKEEPING and not self.in_kernel:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))

    def take(self):
        """The counts so far, which start again."""
        counted, self.counted = self.counted, Counter()
        return counted


class _Counted:
    """A module of kernels whose launches are counted, and not what the interpreter does for them."""

    def __init__(self, kernels, launches):
        self.kernels, self.launches = kernels, launches

    def __getattr__(self, name):
        return _Launcher(getattr(self.kernels, name), name, self.launches)


class _Launcher:
    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.counted[self.name] += 1
            self.launches.in_kernel = True
            try:
                self.kernel[grid](*args, **kwargs)
            finally:
                self.launches.in_kernel = False

        return launch
