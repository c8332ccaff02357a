package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"sendertrust/bench/figures"
	"sendertrust/e2e/postgres"
)

// driver starts the processes, and collects their figures.
type driver struct {
	own, reference string
	server         *postgres.Server
	run            *figures.Run
}

// options are those of a whole run.
type options struct {
	rounds                    int
	only                      *regexp.Regexp
	check, again, merge       bool
	reference, keep, document string
	profiles                  string
}

func parse(arguments []string) (o options, err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&o.rounds, "rounds", 5, "how many times each process is started")
	only := flags.String("only", "", "measure the groups only whose names match this regular expression; nothing is kept, without -merge")
	flags.BoolVar(&o.merge, "merge", false, "with -only: what is measured takes the place of what is kept of it")
	flags.BoolVar(&o.check, "check", false, "compare the ratios to stock mautrix with those that are kept")
	flags.BoolVar(&o.again, "again", false, "write the table anew by the figures that are kept, and measure nothing")
	flags.StringVar(&o.reference, "reference", ".cache/reference/release/reference", "the program of bench/reference; ours alone is measured if it is not there")
	flags.StringVar(&o.keep, "keep", "bench/committed.json", "the figures that are kept")
	flags.StringVar(&o.document, "document", "docs/performance.md", "the document that has the table")
	flags.StringVar(&o.profiles, "profiles", ".cache/bench", "directory for the profile of receiving")
	if err = flags.Parse(arguments); err != nil {
		return o, err
	}
	o.only, err = regexp.Compile("^(" + *only + ")")
	return o, err
}

// all measures everything that is wanted.
func all(ctx context.Context, arguments []string) error {
	o, err := parse(arguments)
	if err != nil {
		return err
	}
	if o.again {
		kept, err := figures.Load(o.keep)
		if err != nil {
			return err
		}
		return writeTable(kept, o.document)
	}
	d := &driver{reference: o.reference, run: &figures.Run{Made: time.Now().UTC().Truncate(time.Second), Rounds: o.rounds}}
	if d.own, err = os.Executable(); err != nil {
		return err
	}
	if _, err = os.Stat(o.reference); err != nil && !o.check {
		fmt.Fprintln(os.Stderr, "The reference is not built (it takes cargo): measuring ours alone.")
		d.reference = ""
	}
	d.run.Machine = machine(d.reference != "")
	groups := plan()
	if o.check {
		groups = checked()
	}
	groups = choose(groups, o.only, d.reference != "")
	err = d.measure(ctx, groups, o.rounds)
	if d.server != nil {
		err = errors.Join(err, d.server.Stop())
	}
	if err != nil {
		return err
	}
	if o.check {
		return compareWithKept(d.run, o.keep)
	}
	fmt.Println(d.run.Table(figures.Goals()))
	if o.only.String() != "^()" {
		if !o.merge {
			return nil
		}
		return d.merge(o)
	}
	if d.reference == "" {
		fmt.Println("Nothing is kept of a run without the reference.")
		return nil
	}
	if missing := d.run.Missing(figures.Goals()); len(missing) > 0 {
		return fmt.Errorf("not kept, for nobody has measured: %s", strings.Join(missing, "; "))
	}
	return d.keep(ctx, o)
}

func compareWithKept(run *figures.Run, file string) error {
	kept, err := figures.Load(file)
	if err != nil {
		return fmt.Errorf("there is nothing to compare with (make bench makes it): %w", err)
	}
	lines, worse := run.Check(kept)
	fmt.Println(strings.Join(lines, "\n"))
	switch {
	case len(lines) == 0:
		return errors.New("nothing was compared")
	case len(worse) > 0:
		return fmt.Errorf("worse than what is kept by more than a fifth:\n%s", strings.Join(worse, "\n"))
	}
	return nil
}

// writeTable puts the table of a run into the document.
func writeTable(run *figures.Run, document string) error {
	return figures.Replace(document, "table", run.Words()+"\n\n"+run.Table(figures.Goals()))
}

// measure has the processes of each group take turns.
func (d *driver) measure(ctx context.Context, groups []group, rounds int) error {
	for _, g := range groups {
		for round := range rounds {
			if g.rounds > 0 && round >= g.rounds {
				break
			}
			for _, p := range g.processes {
				if err := d.start(ctx, p); err != nil {
					return err
				}
			}
			fmt.Fprintf(os.Stderr, "%s %s: round %d\n", time.Now().Format(time.TimeOnly), g.name, round+1)
		}
	}
	return nil
}

// start runs a process to its end.
func (d *driver) start(ctx context.Context, p process) error {
	arguments := append([]string{"-work", p.work, "-store", p.store}, p.options...)
	var cmd *exec.Cmd
	if p.side == reference {
		cmd = exec.CommandContext(ctx, d.reference, doubleDashes(arguments)...)
	} else {
		arguments = append([]string{"-side", p.side}, arguments...)
		if p.store == postgreSQL {
			uri, err := d.newDatabase(ctx)
			if err != nil {
				return err
			}
			defer func() { _ = d.server.Drop(context.WithoutCancel(ctx), uri) }()
			arguments = append(arguments, "-at", uri)
		}
		if p.work == answers {
			cmd = exec.CommandContext(ctx, filepath.Join(filepath.Dir(d.own), answers), arguments...)
		} else {
			cmd = exec.CommandContext(ctx, d.own, append([]string{"one"}, arguments...)...)
		}
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	output, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s has failed: %w\n%s", p.name(), err, said.String())
	}
	measured, err := figures.Read(bytes.NewReader(output))
	if err != nil {
		return fmt.Errorf("%s: %w", p.name(), err)
	}
	d.run.Add(measured)
	return nil
}

// newDatabase makes an empty database on PostgreSQL, whose server is started for the first one.
func (d *driver) newDatabase(ctx context.Context) (uri string, err error) {
	if d.server == nil {
		if d.server, err = postgres.Start(ctx, "."); err != nil {
			return "", err
		}
	}
	return d.server.NewDatabase(ctx)
}

func doubleDashes(arguments []string) []string {
	doubled := make([]string, len(arguments))
	for i, argument := range arguments {
		if strings.HasPrefix(argument, "-") {
			argument = "-" + argument
		}
		doubled[i] = argument
	}
	return doubled
}

// merge puts what was measured into what is kept.
func (d *driver) merge(o options) error {
	kept, err := figures.Load(o.keep)
	if err != nil {
		return err
	}
	kept.Replace(d.run)
	if err = kept.Save(o.keep); err != nil {
		return err
	}
	return writeTable(kept, o.document)
}

// keep writes down what was measured, and makes the profile that shows where the time goes.
func (d *driver) keep(ctx context.Context, o options) error {
	if err := d.run.Save(o.keep); err != nil {
		return err
	}
	if err := writeTable(d.run, o.document); err != nil {
		return err
	}
	if err := os.MkdirAll(o.profiles, 0o755); err != nil {
		return err
	}
	return d.start(ctx, process{hook, full, "keys-1", []string{"-profiles", o.profiles, "-keys", "20000"}})
}
