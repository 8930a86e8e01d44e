"""The exception types of ospnext. Each message says what was asked, what was found and what to do."""

from __future__ import annotations


class OSPNextError(Exception):
    """Base class of every error raised on purpose by ospnext."""


class ConfigError(OSPNextError, ValueError):
    """A configuration key or value is wrong: the message names it and lists what is allowed."""


class PolicyError(OSPNextError, ValueError):
    """An OSPNEXT_* variable or a `use_backend` argument is wrong: the message lists what exists."""


class RegistryError(OSPNextError, RuntimeError):
    """Two plugins claim one id, or a manifest contradicts itself."""


class BackendUnavailableError(OSPNextError, RuntimeError):
    """The backend that was asked for cannot run on this machine: the message lists every reason."""


class UnsupportedRequestError(OSPNextError, RuntimeError):
    """No implementation that the policy allows takes this request: the message is the explanation of the decision."""


class CheckpointError(OSPNextError, RuntimeError):
    """A checkpoint is missing parts, has foreign ones or does not fit its config: the message lists the differences."""


class MissingDependencyError(OSPNextError, ImportError):
    """An optional package is not installed: the message names it and the extra that brings it."""


class CollectiveError(OSPNextError, RuntimeError):
    """A collective timed out or failed: the message names it, its ranks, and what is known of where each of them is."""


class DisagreementError(OSPNextError, RuntimeError):
    """The ranks of a job were started differently: the message says for each fact which rank holds which value."""
