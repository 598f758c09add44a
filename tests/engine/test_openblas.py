import subprocess
import sys

import pytest

from mlxserver.engine.platform import openblas


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only the Linux CPU build needs OpenBLAS")
def test_openblas_is_in_the_process_before_mlx_where_it_is_installed():
    code = """if True:
        import mlxserver.engine.mlx
        from mlxserver.engine.platform import openblas
        print(openblas.preload(), 'openblas' in open('/proc/self/maps').read())"""
    wanted, loaded = in_a_fresh_process(code).split()
    assert wanted == loaded or not openblas.is_wanted()


def test_a_missing_openblas_is_logged_once_with_what_to_install(monkeypatch, caplog):
    monkeypatch.setattr(openblas, "LIBRARY", "libmissing.so.0")
    monkeypatch.setattr(openblas, "is_wanted", lambda: True)
    for cached in (openblas._library, openblas.warn_if_missing):
        cached.cache_clear()
    openblas.warn_if_missing()
    openblas.warn_if_missing()
    for cached in (openblas._library, openblas.warn_if_missing):
        cached.cache_clear()
    assert [record.name for record in caplog.records] == ["engine"]
    assert "apt-get install libopenblas0-pthread" in caplog.text


def test_openblas_uses_as_many_threads_as_are_set():
    library, most = openblas._library(), openblas.threads()
    for count in (1, most):
        openblas.use_threads(count)
        assert library is None or library.openblas_get_num_threads() == count
    assert openblas.threads() == most
