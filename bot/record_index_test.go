package bot

import (
	"database/sql"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"go.mau.fi/util/dbutil"

	"sendertrust/cryptohook"
)

// everyQuery are the statements of this package, by the names of their constants. A test finds those that are missing here.
var everyQuery = map[string]string{
	"getRecordQuery": getRecordQuery, "getOfSessionQuery": getOfSessionQuery, "getOfOwnerQuery": getOfOwnerQuery, "getSinceQuery": getSinceQuery,
	"getDueQuery": getDueQuery, "getNextDueQuery": getNextDueQuery, "insertRecordQuery": insertRecordQuery, "setAnswerQuery": setAnswerQuery,
	"setDueQuery": setDueQuery, "setVerdictQuery": setVerdictQuery, "deleteRecordQuery": deleteRecordQuery, "forgetRoomQuery": forgetRoomQuery,
	"forgetOldQuery": forgetOldQuery, "wasSaidQuery": wasSaidQuery, "insertSaidQuery": insertSaidQuery, "forgetSaidQuery": forgetSaidQuery,
}

var placeholder = regexp.MustCompile(`\$(\d+)`)

// parameters counts the parameters of a statement.
func parameters(query string) (count int) {
	for _, match := range placeholder.FindAllStringSubmatch(query, -1) {
		number, _ := strconv.Atoi(match[1])
		count = max(count, number)
	}
	return count
}

// upgraded gives a database with the bot's tables.
func upgraded(t *testing.T, db *dbutil.Database, err error) *dbutil.Database {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err = newRecords(db, dbutil.NoopLogger).Upgrade(t.Context()); err != nil {
		t.Fatal(err)
	}
	return db
}

func TestEveryStatementUsesAnIndex(t *testing.T) {
	db, err := dbutil.NewWithDialect("file:"+filepath.Join(t.TempDir(), "bot.db"), "sqlite3-fk-wal")
	db = upgraded(t, db, err)
	for name, query := range everyQuery {
		rows, err := db.Query(t.Context(), "EXPLAIN QUERY PLAN "+query, make([]any, parameters(query))...)
		plan, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (detail string, err error) {
			var unused int
			return detail, row.Scan(&unused, &unused, &unused, &detail)
		}, err).AsList()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, detail := range plan {
			// SQLite says SEARCH of MIN and MAX even where it has to read every row.
			reads := strings.HasPrefix(detail, "SCAN ") || strings.HasPrefix(detail, "SEARCH ")
			if reads && !strings.Contains(detail, "USING") || strings.Contains(detail, "TEMP B-TREE") {
				t.Errorf("%s reads or sorts the whole table: %s", name, detail)
			}
		}
	}
}

// postgresPlan is a node of what EXPLAIN tells.
type postgresPlan struct {
	NodeType  string `json:"Node Type"`
	Relation  string `json:"Relation Name"`
	Index     string `json:"Index Name"`
	Condition string `json:"Index Cond"`
	Plans     []postgresPlan
}

// fault says what in a plan grows with the table.
func (p *postgresPlan) fault() string {
	switch {
	case p.NodeType == "Seq Scan":
		return "no index on " + p.Relation
	case p.NodeType == "Sort":
		return "no index has the order"
	case p.Index != "" && p.Condition == "":
		return "all of " + p.Index
	}
	for _, inner := range p.Plans {
		if fault := inner.fault(); fault != "" {
			return fault
		}
	}
	return ""
}

// TestEveryStatementUsesAnIndexOnPostgreSQL makes reading a whole table, and sorting, so dear to the planner that it does either only
// where nothing else is possible.
func TestEveryStatementUsesAnIndexOnPostgreSQL(t *testing.T) {
	uri, err := postgresServer(t).NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	db, err := cryptohook.OpenPostgres(uri)
	db = upgraded(t, db, err)
	conn, err := db.RawDB.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	execute(t, conn, "SET plan_cache_mode=force_generic_plan; SET enable_seqscan=off; SET enable_bitmapscan=off; SET enable_sort=off")
	for name, query := range everyQuery {
		execute(t, conn, "PREPARE "+name+" AS "+query)
		nulls := strings.Repeat(", NULL", parameters(query))
		var explained []byte
		if err = conn.QueryRowContext(t.Context(), "EXPLAIN (FORMAT JSON) EXECUTE "+name+"("+strings.TrimPrefix(nulls, ", ")+")").Scan(&explained); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var plans []struct{ Plan postgresPlan }
		if err = json.Unmarshal(explained, &plans); err != nil || len(plans) != 1 {
			t.Fatalf("%s: %v in %s", name, err, explained)
		}
		if fault := plans[0].Plan.fault(); fault != "" {
			t.Errorf("%s reads or sorts the whole table: %s\n%s", name, fault, explained)
		}
	}
}

func execute(t *testing.T, conn *sql.Conn, statement string) {
	t.Helper()
	if _, err := conn.ExecContext(t.Context(), statement); err != nil {
		t.Fatal(err)
	}
}

// TestEveryStatementIsKnownToTheTest finds the texts of statements, whatever their names are.
func TestEveryStatementIsKnownToTheTest(t *testing.T) {
	known := regexp.MustCompile(`^\s*(SELECT|INSERT|UPDATE|DELETE)\s`)
	tested := make(map[string]bool)
	for _, query := range everyQuery {
		tested[query] = true
	}
	tested[selectRecord] = true // the beginning of others
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(node ast.Node) bool {
			switch n := node.(type) {
			case *ast.ValueSpec:
				for _, name := range n.Names {
					if strings.HasSuffix(name.Name, "Query") && everyQuery[name.Name] == "" {
						t.Errorf("%s in %s is not in everyQuery", name.Name, file)
					}
				}
			case *ast.BasicLit:
				if text, err := strconv.Unquote(n.Value); n.Kind == token.STRING && err == nil && known.MatchString(text) && !tested[text] {
					t.Errorf("%s has a statement that is not in everyQuery: %s", file, text)
				}
			}
			return true
		})
	}
}
