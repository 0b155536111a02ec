"""Credentials as an operator of NATS servers hands them out: keys, and JWTs that they sign."""

import base64
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import nkeys  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Issuer:
    """A key that signs, and is signed itself: an operator's, an account's, a user's."""

    seed: bytes
    name: str

    @property
    def public(self) -> str:
        """How the servers know it."""
        return str(nkeys.from_seed(bytearray(self.seed)).public_key, "ascii")

    def sign(self, subject: "Issuer", kind: str, **claims: Any) -> str:
        """A JWT for a key (https://docs.nats.io/running-a-nats-service/configuration/securing_nats/jwt)."""

        def encode(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

        told = {"jti": subject.name, "iat": int(time.time()), "iss": self.public}
        told |= {"name": subject.name, "sub": subject.public, "nats": {"type": kind, "version": 2, **claims}}
        parts = [encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, told)]
        text = ".".join(parts)
        return f"{text}.{encode(nkeys.from_seed(bytearray(self.seed)).sign(text.encode()))}"


def make_credentials() -> tuple[dict[str, Any], str]:
    """The settings of a server of an operator's with one account, and the credentials file of a user of that."""
    prefixes = {
        "operator": nkeys.PREFIX_BYTE_OPERATOR,
        "account": nkeys.PREFIX_BYTE_ACCOUNT,
        "system": nkeys.PREFIX_BYTE_ACCOUNT,
        "user": nkeys.PREFIX_BYTE_USER,
    }
    operator, account, system, user = [
        Issuer(bytes(nkeys.encode_seed(os.urandom(32), prefix)), name) for name, prefix in prefixes.items()
    ]
    every = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    store = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    jwts = {
        account.public: operator.sign(account, "account", limits={**every, **store, "wildcards": True}),
        system.public: operator.sign(system, "account", limits={**every, "wildcards": True}),
    }
    settings = {
        "operator": operator.sign(operator, "operator", system_account=system.public),
        "resolver": "MEMORY",
        "resolver_preload": jwts,
        "system_account": system.public,
    }
    jwt = account.sign(user, "user", subs=-1, data=-1, payload=-1)
    parts = {"NATS USER JWT": jwt, "USER NKEY SEED": user.seed.decode()}
    text = "".join(f"-----BEGIN {name}-----\n{part}\n------END {name}------\n\n" for name, part in parts.items())
    return settings, text
