// Command bench measures how fast the hook is, against stock mautrix and against Element's crypto (bench/reference), in one run: make
// bench. Each process does one work and ends, so that its memory is its own; those that are compared take turns.
//
//	bench [-rounds 5] [-only REGEXP]    measures everything, or the groups of that name, and prints the table;
//	                                    -merge keeps what those have measured
//	bench -check                        compares with what is kept: make bench-check
//	bench -again                        writes the table anew by what is kept
//	bench one -work keys-1 [-side …]    does one work in this process
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"sendertrust/bench/works"
)

func main() {
	ctx, arguments := context.Background(), os.Args[1:]
	err := error(nil)
	if len(arguments) > 0 && arguments[0] == "one" {
		err = works.Main(ctx, arguments[1:], nil)
	} else {
		err = all(ctx, arguments)
	}
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
