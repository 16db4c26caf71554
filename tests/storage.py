"""An S3 server of moto on this machine, with one bucket."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

_numbers = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """Reached with `settings` in the environment, as any other bucket."""

    name: str
    settings: dict[str, str]
    client: Any

    def put(self, key: str, content: bytes) -> str:
        """Store a file; returns its URL."""
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return f"s3://{self.name}/{key}"

    def put_dataset(self, prefix: str, key: str) -> str:
        """Store a dataset; returns its URL."""
        for suffix in (".bin", ".idx", ".json"):
            self.put(key + suffix, Path(prefix + suffix).read_bytes())
        return f"s3://{self.name}/{key}"

    def content(self) -> dict[str, bytes]:
        """All that is stored."""
        listed = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return {
            each["Key"]: self.client.get_object(Bucket=self.name, Key=each["Key"])["Body"].read() for each in listed
        }


@contextmanager
def new_bucket() -> Iterator[Bucket]:
    """A bucket while the context lasts."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    bucket = f"bucket-{os.getpid()}-{next(_numbers)}"
    try:
        client = boto3.client(
            "s3", endpoint_url=settings["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="secret"
        )
        client.create_bucket(Bucket=bucket)
        yield Bucket(bucket, settings, client)
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()  # they know this server only
