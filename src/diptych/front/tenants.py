"""Who calls: API keys, the tenants they belong to, and what each tenant may have.

A file of tenants (TOML):

    [anybody]                  # limits of callers that are not listed; they come in by --api-key, or freely
    max_requests = 64

    [[tenant]]
    name = "search"
    keys = ["sk-..."]          # or key_sha256 = ["..."], so that the file holds no secret
    weight = 2                 # of its share while others wait
    max_requests = 100         # served or waiting at once
    max_queued_tokens = 200000 # of prompts that wait
    kv_share = 0.5             # of the fleet's KV cache
    cache = "team"             # tenants that name the same one share cached prefixes; default: nobody else
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from diptych.core.errors import ConfigError, in_words
from diptych.policy.admission import TenantLimits

Name = Annotated[str, Meta(pattern="^[A-Za-z0-9._-]{1,64}$")]
Count = Annotated[int, Meta(ge=1)]
SHA256_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """`name` stands in metrics and limits; requests of equal `cache_salt` share cached prefixes."""

    name: str = ""
    cache_salt: str = ""


NOBODY = Tenant()


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """Digests (SHA-256) of the keys that are let in, and whose they are. None at all: everybody is let in."""

    owners: tuple[tuple[bytes, Tenant], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.owners)

    @classmethod
    def of(cls, api_keys: Iterable[str]) -> TenantKeys:
        """A tenant for each key; the only one of a server needs no name. Raises ConfigError for an empty key."""
        keys = list(api_keys)
        if not all(keys):
            raise ConfigError("an API key is empty, which would let everybody in; change --api-key")
        digests = [_digest(key) for key in keys]
        if len(digests) == 1:
            return cls(((digests[0], NOBODY),))
        named = ((digest, Tenant(f"key-{i}", digest.hex()[:16])) for i, digest in enumerate(digests, 1))
        return cls(tuple(named))

    def find(self, key: bytes) -> Tenant | None:
        """Whose key this is. All digests are compared, each in constant time, so that neither the length of a
        key nor its beginning shows in the time an answer takes."""
        given = hashlib.sha256(key).digest()
        found = [tenant for digest, tenant in self.owners if hmac.compare_digest(digest, given)]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Tenants:
    """What a file of tenants says."""

    keys: TenantKeys = TenantKeys()
    limits: Mapping[str, TenantLimits] = field(default_factory=dict)
    anybody: TenantLimits = TenantLimits()


class _Limits(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    max_requests: Count | None = None
    max_queued_tokens: Count | None = None
    kv_share: Annotated[float, Meta(gt=0, le=1)] = 1.0

    def limits(self) -> TenantLimits:
        return TenantLimits(
            weight=self.weight,
            max_requests=self.max_requests,
            max_queued_tokens=self.max_queued_tokens,
            kv_share=self.kv_share,
        )


class _Entry(_Limits, kw_only=True, forbid_unknown_fields=True):
    name: Name
    keys: list[str] = []
    key_sha256: list[str] = []
    cache: Name | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    anybody: _Limits = msgspec.field(default_factory=_Limits)
    tenant: list[_Entry] = []


def read_tenants(path: Path) -> Tenants:
    """Read a file of tenants. Raises ConfigError, saying what is wrong with it."""
    try:
        file = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"--tenants {path}: {in_words(error)}") from error
    owners: dict[bytes, Tenant] = {}
    limits: dict[str, TenantLimits] = {}
    for entry in file.tenant:
        if entry.name in limits:
            raise ConfigError(f"--tenants {path}: tenant {entry.name} is there twice")
        limits[entry.name] = entry.limits()
        tenant = Tenant(entry.name, f"cache:{entry.cache}" if entry.cache is not None else f"tenant:{entry.name}")
        digests = _digests_of(entry, path)
        if not digests or owners.keys() & digests:
            raise ConfigError(f"--tenants {path}: tenant {entry.name} needs a key, and one of its own")
        owners |= dict.fromkeys(digests, tenant)
    return Tenants(TenantKeys(tuple(owners.items())), limits, file.anybody.limits())


def _digests_of(entry: _Entry, path: Path) -> set[bytes]:
    if not all(entry.keys):
        raise ConfigError(f"--tenants {path}: tenant {entry.name} has an empty key, which would let everybody in")
    for text in entry.key_sha256:
        if not SHA256_HEX.fullmatch(text):
            raise ConfigError(f"--tenants {path}: key_sha256 of {entry.name} is 64 digits of lower-case hexadecimal")
    return {_digest(key) for key in entry.keys} | {bytes.fromhex(text) for text in entry.key_sha256}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()
