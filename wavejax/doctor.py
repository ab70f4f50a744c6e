"""Says what of this machine wavejax can use: `python -m wavejax.doctor`."""

from wavejax.cli.interrupts import interrupts_end_the_process

if __name__ == "__main__":
    interrupts_end_the_process()  # before anything that takes long to import

from wavejax.cli.entry import entry

main, run = entry("wavejax.cli.doctor_command")

if __name__ == "__main__":
    run()
