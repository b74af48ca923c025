from polylens.cli.commands import main

main()
