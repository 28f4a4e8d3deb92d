"""Mistakes that a user can mend, as one sentence each."""

import contextlib
import errno
import os

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class UserError(ValueError):
    """A mistake in the input or the machine's state: one sentence that names the field and the fix.

    The entry points of `launch` print it without a traceback; every other error is a bug.
    """


@contextlib.contextmanager
def writing(what: str, fix: str):
    """Turns the system's refusal to write, such as a full disk, into a UserError.

    Libraries hand such a refusal on as an error of their own; there it is known by its words.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = (error.strerror or str(error),) if isinstance(error, OSError) else map(os.strerror, REFUSED)
        reason = next((w for w in words if w in str(error)), None)
        if reason is None:
            raise
        raise UserError(f"{what} cannot be written ({reason}); {fix}") from error
