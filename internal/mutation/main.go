// Command mutation breaks a package in many small ways, one at a time, and sees whether its tests notice.
//
//	go run ./internal/mutation -package ./cryptohook -files steps.go,identity.go -run 'EveryEdge|EveryStory'
//
// Each mutant is one change of one file: a comparison or a condition turned round, a boolean swapped, a statement or a case left out, an
// operator of an SQL statement replaced. The files themselves are not touched: the compiler is shown the mutant in the file's place (-overlay).
// What the tests of -run do not notice is shown to those of -then, which may be slower.
// Survivors are printed with their place, and the rows of tables (sub-tests) that no mutant made fail; the exit code is 1 if there are
// survivors that -known does not list.
package main

import (
	"bufio"
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

func main() {
	var (
		pkg         = flag.String("package", "./cryptohook", "the package whose tests are run")
		files       = flag.String("files", "", "its files to mutate, separated by commas")
		run         = flag.String("run", "", "the tests to run, as for go test")
		then        = flag.String("then", "", "the tests to run besides when those notice nothing; none if empty")
		tags        = flag.String("tags", "goolm", "build tags")
		known       = flag.String("known", "", "a file of survivors that are known, one a line; what follows # says why")
		timeout     = flag.Duration("timeout", 2*time.Minute, "for one mutant's tests")
		skip        = flag.String("skip", "", "the tests not to run, as for go test")
		only        = flag.String("only", "", "try only the mutants whose names match")
		seenFailing = flag.Bool("rows", false, "print for each row by which mutant it was seen failing: the one that the fewest notice")
		list        = flag.Bool("list", false, "only list the mutants")
	)
	flag.Parse()
	excused, err := readKnown(*known)
	if err != nil {
		fatal(err)
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		fatal(err)
	}
	var mutants []mutant
	for name := range strings.SplitSeq(*files, ",") {
		found, err := mutate(filepath.Join(*pkg, name))
		if err != nil {
			fatal(err)
		}
		for _, m := range found {
			if wanted.MatchString(m.String()) {
				mutants = append(mutants, m)
			}
		}
	}
	if *list {
		for _, m := range mutants {
			fmt.Printf("%s:%d: %s\n", m.file, m.line, m.what)
		}
		return
	}
	t := &tests{pkg: *pkg, run: *run, then: *then, skip: *skip, tags: *tags, timeout: *timeout, failed: make(map[string]failure)}
	if t.folder, err = os.MkdirTemp("", "mutation-*"); err != nil {
		fatal(err)
	}
	defer os.RemoveAll(t.folder)
	rows, err := t.prepare(mutants)
	if err != nil {
		fatal(err)
	}
	killed, invalid, survived, unexcused := 0, 0, 0, 0
	for number, m := range mutants {
		if number > 0 && number%50 == 0 {
			fmt.Printf("%d of %d\n", number, len(mutants))
		}
		switch verdict, err := t.try(number, m); {
		case err != nil:
			fatal(err)
		case verdict == outcomeKilled:
			killed++
		case verdict == outcomeInvalid:
			invalid++
		default:
			survived++
			why, isExcused := excused[m.String()]
			if !isExcused {
				unexcused++
				why = "NOT EXPLAINED"
			}
			fmt.Printf("survived: %s:%d: %s # %s\n", m.file, m.line, m.what, why)
		}
	}
	for _, row := range rows {
		seen, ok := t.failed[row]
		switch {
		case !ok:
			fmt.Printf("never seen failing: %s\n", row)
		case *seenFailing:
			fmt.Printf("seen failing: %s (with %d others) by %s\n", row, seen.others, seen.mutant)
		}
	}
	fmt.Printf("%d mutants: %d killed, %d survived (%d not explained), %d do not compile\n", len(mutants), killed, survived, unexcused, invalid)
	if unexcused > 0 {
		_ = os.RemoveAll(t.folder)
		os.Exit(1)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(2)
}

func readKnown(path string) (map[string]string, error) {
	excused := make(map[string]string)
	if path == "" {
		return excused, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	scanner := bufio.NewScanner(bytes.NewReader(text))
	for scanner.Scan() {
		what, why, _ := strings.Cut(scanner.Text(), " # ")
		if what = strings.TrimSpace(what); what != "" && !strings.HasPrefix(what, "#") {
			excused[what] = strings.TrimSpace(why)
		}
	}
	return excused, scanner.Err()
}
