package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// mutant is one change: the bytes from start to end are replaced.
type mutant struct {
	file       string
	line       int
	start, end int
	with       string
	what       string
	kind       kind
}

// String names the mutant independently of line numbers, as -known lists it.
func (m mutant) String() string { return filepath.Base(m.file) + ": " + m.what }

// kind says how a mutant can be one of many in a program that chooses between them while it runs.
type kind int

const (
	// apart: not at all, it is compiled by itself.
	apart kind = iota
	// condition: it is an expression of type bool.
	condition
	// statement: it is a statement, which is left out.
	statement
	// opening: it is what an if statement does before its condition.
	opening
)

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

// finder goes through one file.
type finder struct {
	path   string
	source []byte
	set    *token.FileSet
	// function is where it is; inside says that it is in a function's body.
	function string
	inside   bool
	counts   map[string]int
	// headers are statements that stand in the head of another one.
	headers map[ast.Node]bool
	found   []mutant
}

// mutate gives all mutants of a file.
func mutate(path string) ([]mutant, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f := &finder{path: path, source: source, set: token.NewFileSet(), counts: make(map[string]int), headers: make(map[ast.Node]bool)}
	file, err := parser.ParseFile(f.set, path, source, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, declared := range file.Decls {
		switch d := declared.(type) {
		case *ast.FuncDecl:
			f.function, f.inside = d.Name.Name, true
		case *ast.GenDecl:
			if d.Tok == token.IMPORT {
				continue
			}
			f.function, f.inside = "", false
		}
		ast.Inspect(declared, f.look)
	}
	return f.found, nil
}

func (f *finder) offset(pos token.Pos) int { return f.set.Position(pos).Offset }

func (f *finder) text(from, to token.Pos) string {
	return string(f.source[f.offset(from):f.offset(to)])
}

func (f *finder) short(node ast.Node) string {
	short := strings.Join(strings.Fields(f.text(node.Pos(), node.End())), " ")
	if len(short) > 80 {
		short = short[:80] + "…"
	}
	return short
}

// add notes a mutant: node's text, or what goes from its beginning to end, is replaced.
func (f *finder) add(kind kind, node ast.Node, with, what string) {
	f.addRange(kind, node.Pos(), node.End(), node.Pos(), with, what)
}

func (f *finder) addRange(kind kind, from, to, at token.Pos, with, what string) {
	name := f.function + ": " + what
	f.counts[name]++
	if n := f.counts[name]; n > 1 {
		name = fmt.Sprintf("%s (%d)", name, n)
	}
	if !f.inside {
		kind = apart
	}
	f.found = append(f.found, mutant{f.path, f.set.Position(at).Line, f.offset(from), f.offset(to), with, name, kind})
}

// look notes the mutants of one node.
func (f *finder) look(node ast.Node) bool {
	switch n := node.(type) {
	case *ast.ValueSpec:
		if len(n.Names) > 0 && strings.HasSuffix(n.Names[0].Name, "Query") {
			f.function = n.Names[0].Name
		}
	case *ast.BinaryExpr:
		f.lookAtOperator(n)
	case *ast.UnaryExpr:
		if n.Op == token.NOT {
			f.add(condition, n, f.text(n.X.Pos(), n.X.End()), f.short(n)+" without !")
		}
	case *ast.IfStmt:
		f.lookAtIf(n)
	case *ast.ForStmt:
		f.headers[n.Init], f.headers[n.Post] = true, true
	case *ast.SwitchStmt:
		f.headers[n.Init] = true
		f.lookAtSwitch(n)
	case *ast.TypeSwitchStmt:
		f.headers[n.Init], f.headers[n.Assign] = true, true
	case *ast.CommClause:
		f.headers[n.Comm] = true
	case *ast.Ident:
		if n.Name == "true" || n.Name == "false" {
			f.add(condition, n, map[string]string{"true": "false", "false": "true"}[n.Name], n.Name+" swapped")
		}
	case *ast.ExprStmt, *ast.IncDecStmt, *ast.BranchStmt, *ast.DeferStmt:
		if f.headers[n] {
			f.add(apart, n, "", "without "+f.short(n))
		} else {
			f.add(statement, n, "", "without "+f.short(n))
		}
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE && !f.headers[n] {
			f.add(statement, n, f.unused(n), "without "+f.short(n))
		}
	case *ast.BasicLit:
		f.lookAtSQL(n)
	}
	return true
}

func (f *finder) lookAtOperator(n *ast.BinaryExpr) {
	with, ok := swapped[n.Op]
	if !ok || isText(n) {
		return
	}
	kind := condition
	if n.Op == token.ADD || n.Op == token.SUB {
		kind = apart
	}
	changed := f.text(n.Pos(), n.OpPos) + with + f.text(n.OpPos+token.Pos(len(n.Op.String())), n.End())
	f.addRange(kind, n.Pos(), n.End(), n.OpPos, changed, f.short(n)+" with "+with)
}

func (f *finder) lookAtIf(n *ast.IfStmt) {
	if n.Else != nil {
		f.headers[n.Else] = true
	}
	if init, ok := n.Init.(*ast.AssignStmt); ok && init.Tok != token.DEFINE {
		if f.headers[n] {
			f.add(apart, init, f.unused(init), "without "+f.short(init))
		} else {
			f.addRange(opening, n.Pos(), n.Cond.Pos(), init.Pos(), f.unused(init), "without "+f.short(init))
		}
	}
	f.headers[n.Init] = true
	if !turnsRound(n.Cond) {
		f.add(condition, n.Cond, "!("+f.text(n.Cond.Pos(), n.Cond.End())+")", "if not "+f.short(n.Cond))
	}
}

// turnsRound says that the mutant of the condition's own operator is its opposite.
func turnsRound(condition ast.Expr) bool {
	switch c := condition.(type) {
	case *ast.BinaryExpr:
		return c.Op == token.EQL || c.Op == token.NEQ
	case *ast.UnaryExpr:
		return c.Op == token.NOT
	default:
		return false
	}
}

func (f *finder) lookAtSwitch(n *ast.SwitchStmt) {
	for _, one := range n.Body.List {
		clause := one.(*ast.CaseClause)
		words := make([]string, len(clause.List))
		for i, expression := range clause.List {
			words[i] = f.short(expression)
		}
		what := "without case " + strings.Join(words, ", ")
		switch {
		case clause.List == nil:
		case n.Tag == nil && len(clause.List) == 1:
			f.add(condition, clause.List[0], "false", what)
		default:
			f.add(apart, clause, "", what)
		}
	}
}

func (f *finder) lookAtSQL(n *ast.BasicLit) {
	literal := n.Value
	if n.Kind != token.STRING || !isStatement.MatchString(literal) {
		return
	}
	for _, replaced := range inSQL {
		for at := strings.Index(literal, replaced.part); at >= 0; {
			from := n.Pos() + token.Pos(at)
			around := strings.Join(strings.Fields(literal[max(0, at-25):min(len(literal), at+25)]), " ")
			f.addRange(apart, from, from+token.Pos(len(replaced.part)), from, replaced.with,
				fmt.Sprintf("%q with %q in %s", replaced.part, replaced.with, around))
			next := strings.Index(literal[at+1:], replaced.part)
			if next < 0 {
				break
			}
			at += 1 + next
		}
	}
}

// unused keeps the right sides of an assignment in use, so that the mutant compiles, and what they do is done.
func (f *finder) unused(n *ast.AssignStmt) string {
	if n.Tok != token.ASSIGN {
		return ""
	}
	for _, side := range n.Rhs {
		if id, ok := side.(*ast.Ident); ok && id.Name == "nil" {
			return ""
		}
	}
	return strings.TrimSuffix(strings.Repeat("_, ", len(n.Lhs)), ", ") + " = " + f.text(n.Rhs[0].Pos(), n.Rhs[len(n.Rhs)-1].End())
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
