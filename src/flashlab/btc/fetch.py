"""Download the public Bitcoin minute bars."""

import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

from flashlab.btc.bars import HEADER, Bars, read_bars
from flashlab.errors import UserError, writing

DATASET = "mczielinski/bitcoin-historical-data"
FILE = "btcusd_1-min_data.csv"
URL = f"https://www.kaggle.com/datasets/{DATASET}"
REMEDY = f"run the command again, or download {FILE} by hand from {URL} and name it in DATA="

ATTEMPTS = 3
PAUSE_S = 2.0
SAMPLE_BYTES = 1 << 20  # some 15,000 rows


def fetch(*, out: Path = Path("data")) -> None:
    """Download the public Bitcoin minute bars (Bitstamp, since 2012) from Kaggle; no account is needed.

    A download that stops part-way goes on where it stopped when the command is run again. A file that is already there
    is replaced only once the new one is complete and checked.

    Args:
        out: folder to put the CSV in.
    """
    target = out / FILE
    partial = out / ".fetch"
    if target.is_dir():
        raise UserError(f"{target} is a folder; remove it, or choose another with --out")
    with writing(target):
        partial.mkdir(parents=True, exist_ok=True)
        downloaded = _download(partial)
        try:
            bars = _check(downloaded)
            downloaded.replace(target)
        finally:
            shutil.rmtree(partial)  # what failed the check must not be taken for a download to resume
    first, last = bars.time[[0, -1]]
    print(f"fetched {target}: {target.stat().st_size / 2**20:,.0f} MiB, from {first} to {last} UTC")
    print(f"next: make train DATA={target}")


def _download(folder: Path) -> Path:
    """Let kagglehub download into a folder: it resumes by HTTP range and verifies the MD5 the storage announces."""
    os.environ["KAGGLEHUB_CACHE"] = str(folder)  # beside the target, so that the finished file only has to be renamed
    import kagglehub
    import requests
    from kagglehub.exceptions import DataCorruptionError

    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return Path(kagglehub.dataset_download(DATASET, FILE))
        except requests.HTTPError as error:
            raise UserError(_explain(error.response)) from error
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            problem = f"the connection to Kaggle failed or was cut ({type(error).__name__}); check the network and "
        except (DataCorruptionError, zipfile.BadZipFile) as error:
            problem = f"what arrived of {FILE} is damaged ({type(error).__name__}) and was deleted; "
        except (requests.RequestException, ValueError, KeyError) as error:
            answer = " ".join(str(error).split())[:200]
            raise UserError(
                f"Kaggle's answer makes no sense ({answer}); is a proxy in between? Else {REMEDY}"
            ) from error
        if attempts_left:
            print(f"{problem.split(';')[0]}; trying again", file=sys.stderr)
            time.sleep(PAUSE_S)
    raise UserError(problem + REMEDY)


def _explain(response) -> str:  # type: ignore[no-untyped-def]  # requests is imported late
    status = response.status_code
    if status in (401, 403):
        return (
            f"Kaggle refuses access to {DATASET} (HTTP {status}); the set is public, so remove or renew the Kaggle "
            f"credentials of this account (KAGGLE_API_TOKEN, KAGGLE_KEY, ~/.kaggle), or {REMEDY}"
        )
    if status == 404:
        return f"Kaggle has no file {FILE} in {DATASET} (HTTP 404); look at {URL} whether it was moved or renamed"
    return f"Kaggle answers HTTP {status} {response.reason}; wait a while, then {REMEDY}"


def _check(csv: Path) -> Bars:
    """Read the head and the tail of the file as any other source would be."""
    sample = csv.with_name("sample.csv")
    with csv.open("rb") as file:
        head = file.read(SAMPLE_BYTES)
        file.seek(max(len(head), csv.stat().st_size - SAMPLE_BYTES))
        tail = file.read()
    sample.write_bytes(head[: head.rfind(b"\n") + 1] + tail[tail.find(b"\n") + 1 :])
    try:
        return read_bars([sample])[0]
    except UserError as error:
        raise UserError(
            f"{URL} is not what it was: {error} (expected minute bars under {HEADER}; the file was deleted)"
        ) from error
