from mlxserver.engine.platform import device


def test_the_device_is_described():
    described = device.describe()
    assert described.name
    assert (described.kind == "cpu") == device.is_cpu()
    assert described.memory_bytes > 1 << 28


def test_memory_figures_are_bytes():
    assert device.active_bytes() >= 0
    assert device.process_bytes() > 1 << 20


def test_the_wired_limit_can_be_set_again():
    device.set_wired_limit_once()
    device.set_wired_limit_once()
