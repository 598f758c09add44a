"""Fetching of images that requests name by URLs: what is fetched, from where, and what is not."""

from ipaddress import ip_address

import pytest

from mlxserver.config.http import HttpSettings
from mlxserver.engine.conversation import Image, Message, Text, ToolResult
from mlxserver.engine.errors import PromptRejected
from mlxserver.engine.requests import ChatPrompt, TextPrompt
from mlxserver.server.image_urls import MAX_REDIRECTS, ImageUrls, is_own, is_public
from tests.support.image_site import FILE, Names, open_to_the_test, site
from tests.support.scripted_engine import within_deadline

PLACE = "messages[0].content[0]"
ON = HttpSettings(allow_image_urls=True)


def named(*urls):
    return ChatPrompt((Message("user", tuple([Image(b"", PLACE, url) for url in urls])),))


async def refusal(urls, settings, *names):
    with pytest.raises(PromptRejected) as caught:
        await urls.fetch(named(*names), settings)
    assert caught.value.param == PLACE
    assert f"'{PLACE}'" in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)
    return str(caught.value)


@within_deadline
async def test_an_image_is_fetched_into_its_place():
    async with site() as served:
        url = f"{served.url}/image"
        sent = Image(FILE, "sent")
        prompt = ChatPrompt(
            (
                Message("user", (Text("a"), Image(b"", PLACE, url, "low"), Text("b"), sent)),
                Message("tool", (ToolResult("c", "seen", images=(Image(b"", "there", url),)),)),
            )
        )
        fetched = await open_to_the_test().fetch(prompt, ON)
        assert fetched.conversation == (
            Message("user", (Text("a"), Image(FILE, PLACE, url, "low"), Text("b"), sent)),
            Message("tool", (ToolResult("c", "seen", images=(Image(FILE, "there", url),)),)),
        )
        (request,) = served.requests  # one URL is fetched once
        assert "Cookie" not in request.headers
        assert "Authorization" not in request.headers


@within_deadline
async def test_nothing_is_fetched_unless_the_operator_allows_it():
    async with site() as served:
        message = await refusal(open_to_the_test(), HttpSettings(), f"{served.url}/image")
        assert "allow_image_urls" in message
        assert not served.requests


@within_deadline
async def test_prompts_without_urls_are_passed_on_as_they_are():
    urls = ImageUrls()
    for prompt in (TextPrompt("a"), ChatPrompt((Message("user", (Text("a"), Image(FILE, PLACE))),))):
        assert await urls.fetch(prompt, HttpSettings()) is prompt


@within_deadline
async def test_count_and_length_of_sent_images_are_limited():
    images = [Image(FILE, f"messages[0].content[{n}]") for n in range(4)]
    prompt = ChatPrompt((Message("user", tuple(images)),))
    for settings, place in (
        (HttpSettings(max_images=3), "messages[0].content[3]"),
        (HttpSettings(max_image_bytes=len(FILE) - 1), "messages[0].content[0]"),
    ):
        with pytest.raises(PromptRejected, match="limit of this server") as caught:
            await ImageUrls().fetch(prompt, settings)
        assert caught.value.param == place


FAULTS = {
    "/status": "is answered with the status 404",
    "/large": "is longer than 2000 bytes",
    "/endless": "is longer than 2000 bytes",
    "/slow": "did not arrive within 0.3 seconds",
    "/silent": "did not arrive within 0.3 seconds",
    "/loop": f"leads to more than {MAX_REDIRECTS} others",
    f"/hop/{MAX_REDIRECTS}": f"leads to more than {MAX_REDIRECTS} others",
    "/to?url=file:///etc/passwd": "leads to a URL that is not of http or https",
    "/to?url=ftp://images.test/a": "leads to a URL that is not of http or https",
    "/to?url=data:image/png;base64,AAAA": "leads to a URL that is not of http or https",
    "/to?url=http://[::1": "can't be fetched",
}


@pytest.mark.parametrize("path", FAULTS)
@within_deadline
async def test_what_does_not_come_as_an_image_in_its_limits_is_refused(path):
    patience = {"image_url_timeout": 0.3} if "0.3 seconds" in FAULTS[path] else {}
    settings = HttpSettings(allow_image_urls=True, max_image_bytes=2000, **patience)
    async with site() as served:
        assert FAULTS[path] in await refusal(open_to_the_test(), settings, f"{served.url}{path}")


@within_deadline
async def test_a_few_redirects_are_followed():
    async with site() as served:
        prompt = await open_to_the_test().fetch(named(f"{served.url}/hop/{MAX_REDIRECTS - 1}"), ON)
        assert prompt.conversation[0].images[0].data == FILE


@within_deadline
async def test_all_images_together_are_no_longer_than_a_body():
    settings = HttpSettings(allow_image_urls=True, max_body_bytes=5000)
    async with site() as served:
        urls = [f"{served.url}/large?{n}" for n in range(3)]
        assert "longer than 5000 bytes" in await refusal(open_to_the_test(), settings, *urls)


@within_deadline
async def test_a_packed_body_is_not_unpacked():
    """It stays what it is, and the engine finds that it is no image."""
    async with site() as served:
        prompt = await open_to_the_test().fetch(named(f"{served.url}/packed"), ON)
        assert prompt.conversation[0].images[0].data == FILE


PRIVATE = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
    *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe"),
    *("fec0::1", "::7f00:1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "2001:db8::1"),
]


def test_addresses_of_the_internet_are_told_from_others():
    assert not [address for address in PRIVATE if is_public(ip_address(address))]
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ip_address(address)), address


def test_addresses_of_this_machine_are_told_from_others():
    for address in ("127.0.0.1", "127.0.0.2"):
        assert is_own(ip_address(address)), address
    for address in ("8.8.8.8", "192.0.2.1", "2606:4700::1111"):
        assert not is_own(ip_address(address)), address


@pytest.mark.parametrize("address", PRIVATE)
@within_deadline
async def test_no_name_leads_into_the_private_network(address):
    urls = ImageUrls(resolver=Names(images=[address]))
    assert "fetches nothing from" in await refusal(urls, ON, "http://images.test:9/image")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "2130706433", "0x7f.1", "127.1", "localhost", "[::ffff:127.0.0.1]", "[fe80::1]"]
)
@within_deadline
async def test_no_spelling_of_an_address_is_fetched(host):
    """Names are resolved by the system here."""
    message = await refusal(ImageUrls(), ON, f"http://{host}:9/image")
    assert "fetches nothing from" in message or "can't be" in message


@within_deadline
async def test_no_redirect_leads_into_the_private_network():
    async with site() as served:
        for target in ("http://10.0.0.1/image", "http://inner.test/image", "http://[::1]/image"):
            urls = open_to_the_test(Names(inner=["192.168.0.1"]))
            message = await refusal(urls, ON, f"{served.url}/to?url={target}")
            assert "fetches nothing from" in message
        assert {request.path for request in served.requests} == {"/to"}


@within_deadline
async def test_a_name_that_leads_elsewhere_the_second_time_is_checked_again():
    """DNS rebinding: the address is checked of each connection, not of the name."""
    async with site() as served:
        names = Names(images=["127.0.0.1", "10.0.0.1"])
        assert "fetches nothing from" in await refusal(open_to_the_test(names), ON, f"{served.url}/hop/0")
        assert names.asked == ["images.test", "images.test"]


@within_deadline
async def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with site() as served:
        prompt = await open_to_the_test().fetch(named(f"{served.url}/image"), ON)
        assert prompt.conversation[0].images[0].data == FILE
