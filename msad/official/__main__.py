"""`python -m msad.official IN.pth OUT.pt`: an authors' detector becomes a checkpoint of this program."""

from .. import checkpoint
from ..annotations import InputError
from ..settings import Parser
from ..training import main


def convert():
    parser = Parser(prog="python -m msad.official", description="Convert a detector of the authors' once.")
    parser.add_argument("source", metavar="IN.pth")
    parser.add_argument("target", metavar="OUT.pt")
    args = parser.parse_args()
    content = checkpoint.read(args.source)
    if "summary" not in content:
        raise InputError(f"{args.source}: is a checkpoint of this program already")
    checkpoint.save(args.target, checkpoint.restore(content, args.source))
    print(f"{content['summary']}\nwritten to {args.target}")


if __name__ == "__main__":
    main(convert)
