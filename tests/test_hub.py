"""The loopback Hub is all that its clients can reach."""

from hub import LoopbackHub


def test_stray_requests_are_refused(tmp_path):
    code = """
    from urllib.error import URLError
    from urllib.request import urlopen

    for url in ("https://example.com/", "http://example.com/api/models/tester/model"):
        try:
            urlopen(url)
        except URLError:
            pass
        else:
            raise AssertionError(f"{url} was answered")
    """
    with LoopbackHub() as hub:
        hub.run(code, tmp_path)
        assert hub.log == ["CONNECT example.com:443", "GET http://example.com/api/models/tester/model"]
