"""Files in object storage: fetched again while a failure may pass, or else one line that says what is wrong."""

import io
import random
import sys
import time
from collections.abc import Callable
from itertools import count

from flashlab.errors import UserError

PATIENCE_S = 60.0  # from the first failure of a request until it is given up
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # between two attempts
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0  # without a byte

Fetch = Callable[[str], bytes]


def open_storage(url: str) -> Fetch:
    """Open a folder of object storage: ``s3://`` through boto3, ``gs://`` and the like through litdata's downloaders.

    A request to S3 that is not answered, answered in part, or refused for the moment (408, 429, 5xx) is repeated after
    growing waits. The clients of other stores see to that themselves.

    Returns:
        A function from a file's name to its content, for this process alone: clients do not outlive a fork.

    Raises:
        UserError: by that function, if there is no such file, access is denied, or the store stays away.
    """
    url = url.rstrip("/")
    jitter = random.Random()  # of its own: training's draws must not depend on a network
    get: Fetch | None = None

    def fetch(name: str) -> bytes:
        nonlocal get
        place, deadline = f"{url}/{name}", 0.0
        for attempt in count():
            try:
                get = get or (_s3() if url.startswith("s3://") else _litdata(url))
                content = get(place)
                break
            except Exception as error:  # whatever the store's client raises
                may_pass, reason, remedy = _judge(error)
                deadline = deadline or time.monotonic() + PATIENCE_S
                left = deadline - time.monotonic()
                if may_pass and left <= 0:
                    reason = f"still failing after {PATIENCE_S:g} s ({reason})"
                if not may_pass or left <= 0:
                    raise UserError(f"cannot fetch {place}: {reason}; {remedy}") from error
                if attempt == 3:
                    print(f"waiting for {place} ({reason}), at most {left:.0f} s more", file=sys.stderr, flush=True)
                time.sleep(min(jitter.uniform(0.5, 1) * min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S), left))
        if not content:  # what litdata leaves of a URL it does not know
            raise UserError(
                f"cannot fetch {place}: it is empty, or not a URL that litdata reads, as s3://BUCKET/SET is"
            )
        return content

    return fetch


def _s3() -> Fetch:
    import boto3  # slow to import, and most sets are local
    from botocore.config import Config

    # Retries are those of `fetch`, which know of content that breaks off: boto3's are over when content begins.
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S)
    client = boto3.session.Session().client("s3", config=config)

    def get(place: str) -> bytes:
        bucket, _, key = place.removeprefix("s3://").partition("/")
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()

    return get


def _litdata(url: str) -> Fetch:
    from litdata.streaming.downloader import get_downloader

    downloader = get_downloader(url, "", [])

    def get(place: str) -> bytes:
        content = io.BytesIO()
        downloader.download_fileobj(place, content)
        return content.getvalue()

    return get


def _judge(error: Exception) -> tuple[bool, str, str]:
    """Say of an error whether it may pass, what it was, and what to do."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    reason = " ".join(str(error).split())[:200]
    if isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError, ResponseParserError)):
        return True, reason, "check the endpoint (AWS_ENDPOINT_URL) and the connection"
    if not isinstance(error, ClientError):
        return False, reason, "check the URL, the credentials and the connection"
    answer = error.response.get("Error", {})
    reason = f"{answer.get('Message', reason).rstrip('.')} ({answer.get('Code')})"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in (408, 429) or status >= 500:
        return True, reason, "check the server, and how much is asked of it"
    if status == 404:
        return False, reason, "check bucket and path, and that the whole set was put there"
    return False, reason, "check credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) and region"
