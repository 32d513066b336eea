"""Which servers may be asked: TLS beyond this machine, no metadata services, private networks only where allowed."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from kdcli.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# They hand out a cloud machine's own credentials to whoever asks from it.
METADATA = {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
METADATA_IPV6 = ipaddress.ip_address("fd00:ec2::254")
SHARED = ipaddress.ip_network("100.64.0.0/10")  # carrier-grade NAT: neither private nor global to Python
NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
KEYS = {  # whose key a usual variable holds, so that a recipe's URL cannot ask for it
    "OPENAI_API_KEY": "api.openai.com",
    "ANTHROPIC_API_KEY": "api.anthropic.com",
    "MISTRAL_API_KEY": "api.mistral.ai",
    "TOGETHER_API_KEY": "api.together.xyz",
    "FIREWORKS_API_KEY": "api.fireworks.ai",
    "OPENROUTER_API_KEY": "openrouter.ai",
    "GROQ_API_KEY": "api.groq.com",
    "DEEPSEEK_API_KEY": "api.deepseek.com",
    "HF_TOKEN": "router.huggingface.co",
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server, by its base URL. Raises ConfigError for a URL that may not be asked, which begins with `where`."""

    url: str  # http(s)://HOST[:PORT][/PATH], without a slash at the end
    host: str
    port: int
    secure: bool
    allow_private: bool

    @classmethod
    def of(cls, url: str, *, allow_private: bool = False, where: str = "url") -> Server:
        parts = urlsplit(url.strip())
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(
                f"{where}: its port is no number from 0 to 65535; write http://127.0.0.1:8000/v1"
            ) from error
        # The URL is not repeated before it is known to hold no password.
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{where}: holds a user or a password; remove them and name a variable in api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{where}: {url!r} is no address of a server; write http://127.0.0.1:8000/v1 or https://…"
            )
        if parts.query or parts.fragment:
            raise ConfigError(f"{where}: a base URL has no ? and no #: {url!r}")
        secure = parts.scheme == "https"
        host = parts.hostname.lower().rstrip(".")
        server = cls(
            url=url.strip().rstrip("/"),
            host=host,
            port=port or (443 if secure else 80),
            secure=secure,
            allow_private=allow_private,
        )
        if problem := server._problem():
            raise ConfigError(f"{where}: {problem}")
        return server

    @property
    def name(self) -> str:
        """For messages: HOST:PORT."""
        return f"{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        literal = _literal(self.host)
        return self.host == "localhost" or (literal is not None and literal.is_loopback)

    def resolve(self) -> str:
        """The address to connect to now. All that the name leads to are checked, at every call, since a name can be
        moved after it was checked. Raises OSError if the name is unknown, ConfigError if one is not allowed.
        """
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            if problem := self._refusal(address):
                raise ConfigError(f"{self.host}: {problem}")
        return str(addresses[0])

    def _problem(self) -> str:
        """What is wrong with the name or the address that the URL gives, before anything is asked."""
        if self.host in METADATA:
            return f"{self.host} is a cloud's metadata service, and no model"
        literal = _literal(self.host)
        if literal is not None:
            return self._refusal(literal)
        if not self.secure and not self.local and not self.allow_private:
            return f"{self.host} is not this machine, so it is asked over https:// only"
        return ""

    def _refusal(self, address: Address) -> str:
        """Why an address is not asked; empty if it is."""
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if address.is_link_local or address == METADATA_IPV6:
            return f"{address} is a link-local address, where clouds hand out credentials; no server is asked there"
        if address.is_loopback:
            return "" if self.local else f"leads to {address}, this machine; write 127.0.0.1 if that is meant"
        if address.is_multicast or address.is_reserved or address.is_unspecified:
            return f"{address} is no address of a server"
        if address.is_private or address in SHARED:
            if not self.allow_private:
                return f"{address} is in a private network; set allow_private=true if the server is yours"
            return ""
        return "" if self.secure else f"{address} is not this machine or network, so it is asked over https:// only"


def read_key(variable: str, server: Server, where: str = "api_key_env") -> str:
    """The key that a variable holds, if it is one for this server.

    Keys of known vendors go to their own host, others to the config's; `VARIABLE_HOST=host` in the environment says
    otherwise. Never over plain http beyond this machine. Raises ConfigError, which does not repeat the key.
    """
    require_name(variable, where)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{where}: the environment variable {variable} is not set; export {variable}=… and run again")
    bound = os.environ.get(f"{variable}_HOST") or KEYS.get(variable)
    if bound and server.host != bound.strip().lower():
        raise ConfigError(
            f"{where}: {variable} is a key for {bound}, and url is of {server.host}; name another variable, or export "
            f"{variable}_HOST={server.host} if that host may have it"
        )
    if not server.secure and not server.local:
        raise ConfigError(f"{where}: a key is not sent over plain http to {server.host}; serve it over https://")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{where}: {variable} holds characters that no key has; set it again")
    return key


def require_name(variable: str, where: str) -> None:
    """Raise ConfigError unless `variable` looks like a variable's name, and not like a key."""
    if not NAME.fullmatch(variable):
        raise ConfigError(
            f"{where}: must be the name of an environment variable, in capitals, such as TEACHER_API_KEY; what it "
            "holds is not repeated here, since it may be the key itself"
        )


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
