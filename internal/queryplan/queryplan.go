// Package queryplan asks databases how they would run statements, for tests that no statement reads a whole table.
package queryplan

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"go.mau.fi/util/dbutil"
)

var placeholder = regexp.MustCompile(`\$(\d+)`)

// parameters counts the parameters of a statement.
func parameters(query string) (count int) {
	for _, match := range placeholder.FindAllStringSubmatch(query, -1) {
		number, _ := strconv.Atoi(match[1])
		count = max(count, number)
	}
	return count
}

// Faults says which of the statements, by their names, read or sort something that grows with a table. The tables have to exist.
func Faults(ctx context.Context, db *dbutil.Database, queries map[string]string) (faults map[string]string, err error) {
	faults = make(map[string]string)
	explain := explainSQLite
	if db.Dialect == dbutil.Postgres {
		conn, err := db.RawDB.Conn(ctx)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		if _, err = conn.ExecContext(ctx, dearPlans); err != nil {
			return nil, err
		}
		explain = func(ctx context.Context, _ *dbutil.Database, query string) (string, error) {
			return explainPostgres(ctx, conn, query)
		}
	}
	for name, query := range queries {
		fault, err := explain(ctx, db, query)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if fault != "" {
			faults[name] = fault
		}
	}
	return faults, nil
}

// explainSQLite gives what is wrong with SQLite's plan. Sorting the few rows that an index gives is not.
func explainSQLite(ctx context.Context, db *dbutil.Database, query string) (string, error) {
	rows, err := db.Query(ctx, "EXPLAIN QUERY PLAN "+query, make([]any, parameters(query))...)
	plan, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (detail string, err error) {
		var unused int
		return detail, row.Scan(&unused, &unused, &unused, &detail)
	}, err).AsList()
	// What a statement brings along itself is no table.
	own := map[string]bool{"CONSTANT ROW": true}
	for _, detail := range plan {
		if name, made := strings.CutPrefix(detail, "CO-ROUTINE "); made {
			own[name] = true
		}
		if own[strings.TrimPrefix(detail, "SCAN ")] {
			continue
		}
		// SQLite says SEARCH of MIN and MAX even where it has to read every row.
		reads := strings.HasPrefix(detail, "SCAN ") || strings.HasPrefix(detail, "SEARCH ")
		if reads && !strings.Contains(detail, "USING") || strings.Contains(detail, "TEMP B-TREE FOR ORDER BY") && strings.Contains(query, "LIMIT") {
			return detail, err
		}
	}
	return "", err
}

// dearPlans makes reading a whole table, and sorting, so dear to PostgreSQL's planner that it does either only where nothing else is
// possible: with the tables empty, it would always be cheaper.
const dearPlans = `
	SET plan_cache_mode=force_generic_plan; SET enable_seqscan=off; SET enable_bitmapscan=off; SET enable_sort=off;
	SET enable_hashjoin=off; SET enable_mergejoin=off
`

// postgresPlan is a node of what EXPLAIN tells.
type postgresPlan struct {
	NodeType  string `json:"Node Type"`
	Relation  string `json:"Relation Name"`
	Index     string `json:"Index Name"`
	Condition string `json:"Index Cond"`
	Plans     []postgresPlan
}

func explainPostgres(ctx context.Context, conn *sql.Conn, query string) (string, error) {
	if _, err := conn.ExecContext(ctx, "PREPARE explained AS "+query); err != nil {
		return "", err
	}
	execute := "EXPLAIN (FORMAT JSON) EXECUTE explained"
	if count := parameters(query); count > 0 {
		execute += "(NULL" + strings.Repeat(", NULL", count-1) + ")"
	}
	var explained []byte
	err := conn.QueryRowContext(ctx, execute).Scan(&explained)
	if _, closeErr := conn.ExecContext(ctx, "DEALLOCATE explained"); err != nil || closeErr != nil {
		return "", errors.Join(err, closeErr)
	}
	var plans []struct{ Plan postgresPlan }
	if err = json.Unmarshal(explained, &plans); err != nil || len(plans) != 1 {
		return "", fmt.Errorf("%w: %s", err, explained)
	}
	fault, err := plans[0].Plan.fault(ctx, conn, query)
	if fault != "" {
		fault += "\n" + string(explained)
	}
	return fault, err
}

// fault says what in a plan grows with the table. A partial index that is read from one end to the other is what was asked for.
func (p *postgresPlan) fault(ctx context.Context, conn *sql.Conn, query string) (string, error) {
	switch {
	case p.NodeType == "Seq Scan":
		return "no index on " + p.Relation, nil
	case p.NodeType == "Sort" && strings.Contains(query, "LIMIT") && !strings.Contains(query, " IN ("):
		return "the index does not have the order", nil
	case p.Index != "" && p.Condition == "":
		var partial bool
		err := conn.QueryRowContext(ctx, "SELECT indpred IS NOT NULL FROM pg_index WHERE indexrelid=$1::regclass", p.Index).Scan(&partial)
		if err != nil || !partial {
			return "all of " + p.Index, err
		}
	}
	for _, inner := range p.Plans {
		if fault, err := inner.fault(ctx, conn, query); fault != "" || err != nil {
			return fault, err
		}
	}
	return "", nil
}

var statement = regexp.MustCompile(`^\s*(SELECT|INSERT|UPDATE|DELETE)\s`)

// Unknown gives the statements in the source files of a folder that are not among the known ones: constants whose names end in Query, and
// texts that are statements wherever they stand.
func Unknown(folder string, known map[string]string) (unknown []string, err error) {
	files, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		return nil, err
	}
	begins := func(text string) bool {
		for _, query := range known {
			if strings.HasPrefix(query, text) {
				return true
			}
		}
		return false
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			return nil, err
		}
		ast.Inspect(parsed, func(node ast.Node) bool {
			switch n := node.(type) {
			case *ast.ValueSpec:
				for i, name := range n.Names {
					if strings.HasSuffix(name.Name, "Query") && i < len(n.Values) && isText(n.Values[i]) && known[name.Name] == "" {
						unknown = append(unknown, name.Name+" in "+file)
					}
				}
			case *ast.BasicLit:
				if text, err := strconv.Unquote(n.Value); n.Kind == token.STRING && err == nil && statement.MatchString(text) && !begins(text) {
					unknown = append(unknown, text+" in "+file)
				}
			}
			return true
		})
	}
	return unknown, nil
}

// isText says that an expression is a string, or strings added up.
func isText(expression ast.Expr) bool {
	switch e := expression.(type) {
	case *ast.BasicLit:
		return e.Kind == token.STRING
	case *ast.BinaryExpr:
		return isText(e.X) || isText(e.Y)
	default:
		return false
	}
}
