"""What every test needs: that Ctrl-C is heard."""

import signal

# A shell that starts pytest in the background has it, and all that it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
