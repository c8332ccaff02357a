// Command mutation breaks a package in many small ways, one at a time, and sees whether its tests notice.
//
//	go run ./internal/mutation -package ./cryptohook -files steps.go,identity.go -run 'EveryEdge|EveryStory'
//
// Each mutant is one change of one file: a comparison or a condition turned round, a boolean swapped, a statement left out, an operator of
// an SQL statement replaced. The files themselves are not touched: the compiler is shown the mutant in the file's place (-overlay).
// Survivors are printed with their place, and the rows of tables (sub-tests) that no mutant made fail; the exit code is 1 if there are
// survivors that -known does not list.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// mutant is one change: the bytes from start to end are replaced.
type mutant struct {
	file       string
	line       int
	start, end int
	with       string
	what       string
}

// String names the mutant independently of line numbers, as -known lists it.
func (m mutant) String() string { return filepath.Base(m.file) + ": " + m.what }

func main() {
	var (
		pkg     = flag.String("package", "./cryptohook", "the package whose tests are run")
		files   = flag.String("files", "", "its files to mutate, separated by commas")
		run     = flag.String("run", "", "the tests to run, as for go test")
		tags    = flag.String("tags", "goolm", "build tags")
		known   = flag.String("known", "", "a file of survivors that are known, one a line; what follows # says why")
		timeout = flag.Duration("timeout", 2*time.Minute, "for one mutant's tests")
		skip    = flag.String("skip", "", "the tests not to run, as for go test")
		from    = flag.Int("from", 0, "leave out so many mutants")
		list    = flag.Bool("list", false, "only list the mutants")
	)
	flag.Parse()
	excused, err := readKnown(*known)
	if err != nil {
		fatal(err)
	}
	var mutants []mutant
	for name := range strings.SplitSeq(*files, ",") {
		found, err := mutate(filepath.Join(*pkg, name))
		if err != nil {
			fatal(err)
		}
		mutants = append(mutants, found...)
	}
	if *list {
		for _, m := range mutants {
			fmt.Printf("%s:%d: %s\n", m.file, m.line, m.what)
		}
		return
	}
	t := tests{pkg: *pkg, run: *run, skip: *skip, tags: *tags, timeout: *timeout, failed: make(map[string]bool)}
	out, err := t.test([]string{"-v"})
	if err != nil {
		fatal(fmt.Errorf("the tests fail without any mutant: %w\n%s", err, out[max(0, len(out)-2000):]))
	}
	rows := rowsOf(out)
	killed, invalid, survived, unexcused := 0, 0, 0, 0
	for i, m := range mutants[min(*from, len(mutants)):] {
		switch verdict, err := t.try(m); {
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
			fmt.Printf("survived (%d): %s:%d: %s # %s\n", i+*from, m.file, m.line, m.what, why)
		}
	}
	for _, row := range rows {
		if !t.failed[row] {
			fmt.Printf("never seen failing: %s\n", row)
		}
	}
	fmt.Printf("%d mutants: %d killed, %d survived (%d not explained), %d do not compile\n", len(mutants), killed, survived, unexcused, invalid)
	if unexcused > 0 {
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

// tests is how the package is tested.
type tests struct {
	pkg, run, skip, tags string
	timeout              time.Duration
	// failed are the tests that some mutant made fail.
	failed map[string]bool
}

var (
	ranLine  = regexp.MustCompile(`(?m)^=== RUN +(\S+/\S+)$`)
	failLine = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
)

// rowsOf gives the sub-tests that have run.
func rowsOf(out []byte) (rows []string) {
	for _, match := range ranLine.FindAllSubmatch(out, -1) {
		rows = append(rows, string(match[1]))
	}
	return rows
}

type outcome int

const (
	outcomeKilled outcome = iota
	outcomeSurvived
	outcomeInvalid
)

func (t tests) try(m mutant) (outcome, error) {
	source, err := os.ReadFile(m.file)
	if err != nil {
		return 0, err
	}
	changed := string(source[:m.start]) + m.with + string(source[m.end:])
	folder, err := os.MkdirTemp("", "mutation-*")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(folder)
	stand, overlay := filepath.Join(folder, "mutant.go"), filepath.Join(folder, "overlay.json")
	absolute, err := filepath.Abs(m.file)
	if err != nil {
		return 0, err
	}
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{absolute: stand}})
	if err != nil {
		return 0, err
	}
	if err = errors.Join(os.WriteFile(stand, []byte(changed), 0o600), os.WriteFile(overlay, replace, 0o600)); err != nil {
		return 0, err
	}
	out, err := t.test([]string{"-overlay", overlay})
	switch {
	case err == nil:
		return outcomeSurvived, nil
	case bytes.Contains(out, []byte("[build failed]")):
		return outcomeInvalid, nil
	default:
		for _, match := range failLine.FindAllSubmatch(out, -1) {
			t.failed[string(match[1])] = true
		}
		return outcomeKilled, nil
	}
}

func (t tests) test(extra []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), t.timeout+time.Minute)
	defer cancel()
	// vet is not asked: it complains of what a mutant leaves unused or doubtful.
	args := append([]string{
		"test", "-tags", t.tags, "-count", "1", "-vet", "off", "-timeout", t.timeout.String(), "-run", t.run, "-skip", t.skip,
	}, extra...)
	command := exec.CommandContext(ctx, "go", append(args, t.pkg)...)
	// A mutant may loop for ever: the test binary has to end with go test.
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }
	command.WaitDelay = 5 * time.Second
	return command.CombinedOutput()
}

// swapped are the operators that take each other's places.
var swapped = map[token.Token]string{
	token.EQL: "!=", token.NEQ: "==", token.LSS: "<=", token.LEQ: "<", token.GTR: ">=", token.GEQ: ">", token.LAND: "||", token.LOR: "&&",
	token.ADD: "-", token.SUB: "+",
}

// inSQL are the parts of SQL statements that are replaced, by what.
var inSQL = []struct{ part, with string }{
	{"<>", "="}, {"=$", "<>$"}, {"<= $", "> $"}, {"> $", "<= $"}, {"NOT EXISTS", "EXISTS"}, {"AND NOT ", "AND "}, {"=true", "=false"}, {"=false", "=true"},
	{" AND source='direct'", ""}, {"IS NOT NULL", "IS NULL"}, {"IS NULL", "IS NOT NULL"}, {"DISTINCT ", ""}, {"DESC", "ASC"},
}

var isStatement = regexp.MustCompile(`\b(SELECT|INSERT|UPDATE|DELETE|WHERE)\b`)

func mutate(path string) (mutants []mutant, err error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	function := ""
	counts := make(map[string]int)
	add := func(from, to token.Pos, with, what string) {
		start, end := set.Position(from).Offset, set.Position(to).Offset
		name := function + ": " + what
		counts[name]++
		if n := counts[name]; n > 1 {
			name = fmt.Sprintf("%s (%d)", name, n)
		}
		mutants = append(mutants, mutant{path, set.Position(from).Line, start, end, with, name})
	}
	text := func(node ast.Node) string {
		short := strings.Join(strings.Fields(string(source[set.Position(node.Pos()).Offset:set.Position(node.End()).Offset])), " ")
		if len(short) > 80 {
			short = short[:80] + "…"
		}
		return short
	}
	ast.Inspect(file, func(node ast.Node) bool {
		switch n := node.(type) {
		case *ast.FuncDecl:
			function = n.Name.Name
		case *ast.GenDecl:
			if n.Tok == token.IMPORT {
				return false
			}
		case *ast.ValueSpec:
			if len(n.Names) > 0 && strings.HasSuffix(n.Names[0].Name, "Query") {
				function = n.Names[0].Name
			}
		case *ast.BinaryExpr:
			if with, ok := swapped[n.Op]; ok && !isText(n) {
				add(n.OpPos, n.OpPos+token.Pos(len(n.Op.String())), with, text(n)+" with "+with)
			}
		case *ast.UnaryExpr:
			if n.Op == token.NOT {
				add(n.OpPos, n.OpPos+1, "", text(n)+" without !")
			}
		case *ast.IfStmt:
			add(n.Cond.Pos(), n.Cond.End(), "!("+string(source[set.Position(n.Cond.Pos()).Offset:set.Position(n.Cond.End()).Offset])+")", "if not "+text(n.Cond))
		case *ast.Ident:
			if n.Name == "true" || n.Name == "false" {
				add(n.Pos(), n.End(), map[string]string{"true": "false", "false": "true"}[n.Name], n.Name+" swapped")
			}
		case *ast.ExprStmt, *ast.IncDecStmt, *ast.BranchStmt, *ast.DeferStmt:
			add(n.Pos(), n.End(), "", "without "+text(n))
		case *ast.AssignStmt:
			if n.Tok != token.DEFINE {
				add(n.Pos(), n.End(), blank(n, source, set), "without "+text(n))
			}
		case *ast.BasicLit:
			literal := n.Value
			if n.Kind != token.STRING || !isStatement.MatchString(literal) {
				return true
			}
			for _, replaced := range inSQL {
				for at := strings.Index(literal, replaced.part); at >= 0; {
					from := n.Pos() + token.Pos(at)
					around := strings.Join(strings.Fields(literal[max(0, at-25):min(len(literal), at+25)]), " ")
					add(from, from+token.Pos(len(replaced.part)), replaced.with, fmt.Sprintf("%q with %q in %s", replaced.part, replaced.with, around))
					next := strings.Index(literal[at+1:], replaced.part)
					if next < 0 {
						break
					}
					at += 1 + next
				}
			}
		}
		return true
	})
	return mutants, nil
}

// blank keeps the right sides of an assignment in use, so that the mutant compiles.
func blank(n *ast.AssignStmt, source []byte, set *token.FileSet) string {
	if n.Tok != token.ASSIGN {
		return ""
	}
	left := strings.TrimSuffix(strings.Repeat("_, ", len(n.Lhs)), ", ")
	from, to := set.Position(n.Rhs[0].Pos()).Offset, set.Position(n.Rhs[len(n.Rhs)-1].End()).Offset
	for _, side := range n.Rhs {
		if id, ok := side.(*ast.Ident); ok && id.Name == "nil" {
			return ""
		}
	}
	return left + " = " + string(source[from:to])
}

// isText says that strings are added up.
func isText(n *ast.BinaryExpr) bool {
	if n.Op != token.ADD {
		return false
	}
	for _, side := range []ast.Expr{n.X, n.Y} {
		if literal, ok := side.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			return true
		}
	}
	return false
}
