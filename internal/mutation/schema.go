package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// All mutants that can be are compiled into one program, which a variable of its environment tells which one it is: compiling takes longer
// than the tests do.

const (
	chosenVariable = "MUTANT"
	// chosen is the number of the mutant that the program is, counted from 1.
	chosen = "chosenMutant"
)

// chooser is the file that is added to the package.
func chooser(pkg string) string {
	return fmt.Sprintf("package %s\n\nimport (\n\t\"os\"\n\t\"strconv\"\n)\n\nvar %s, _ = strconv.Atoi(os.Getenv(%q))\n", pkg, chosen, chosenVariable)
}

// schema is the source of a file with all its mutants in it; numbers are those of the mutants.
type schema struct {
	source []byte
	sites  []site
}

// site is a place in the source, and what the mutants make of it.
type site struct {
	start, end int
	kind       kind
	mutants    map[int]mutant
}

// withAll gives the file's source with these mutants in it.
func withAll(path string, mutants map[int]mutant) (string, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	s := schema{source: source}
	for number, m := range mutants {
		i := slices.IndexFunc(s.sites, func(at site) bool { return at.start == m.start && at.end == m.end && at.kind == m.kind })
		if i < 0 {
			i = len(s.sites)
			s.sites = append(s.sites, site{m.start, m.end, m.kind, make(map[int]mutant)})
		}
		s.sites[i].mutants[number] = m
	}
	// Whoever holds others comes before them.
	slices.SortFunc(s.sites, func(a, b site) int { return cmp.Or(a.start-b.start, b.end-a.end, int(b.kind-a.kind)) })
	return s.render(0, len(source), s.sites), nil
}

// render gives a part of the source, with the sites that lie in it.
func (s schema) render(from, to int, sites []site) string {
	var out strings.Builder
	for len(sites) > 0 {
		at := sites[0]
		inner := sites[1:]
		after := len(inner)
		if i := slices.IndexFunc(inner, func(other site) bool { return other.start >= at.end }); i >= 0 {
			after = i
		}
		out.Write(s.source[from:at.start])
		out.WriteString(at.render(s.render(at.start, at.end, inner[:after])))
		from, sites = at.end, inner[after:]
	}
	out.Write(s.source[from:to])
	return out.String()
}

// render gives what stands at the site: unchanged, as it is given, or as the chosen mutant has it.
func (at site) render(unchanged string) string {
	var out strings.Builder
	switch at.kind {
	case condition:
		out.WriteString("(func() bool { switch " + chosen + " {\n")
		for number, m := range at.mutants {
			fmt.Fprintf(&out, "case %d: return %s\n", number, m.with)
		}
		out.WriteString("}\nreturn " + unchanged + " }())")
	case statement:
		for number, m := range at.mutants {
			fmt.Fprintf(&out, "if %s == %d { %s } else { %s }", chosen, number, m.with, unchanged)
		}
	case opening:
		before := strings.TrimSuffix(strings.TrimSpace(strings.TrimPrefix(unchanged, "if ")), ";")
		for number, m := range at.mutants {
			fmt.Fprintf(&out, "if %s == %d { %s } else { %s }\nif ", chosen, number, m.with, before)
		}
	}
	return out.String()
}

// packageName is that of a file.
func packageName(path string) (string, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(source)) {
		if name, ok := strings.CutPrefix(line, "package "); ok {
			return strings.TrimSpace(name), nil
		}
	}
	return "", fmt.Errorf("%s is of no package", filepath.Base(path))
}
