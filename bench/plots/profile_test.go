package main

import (
	"testing"

	"github.com/google/pprof/profile"
)

func TestSampleBelongsToTheInnermostFunctionThatIsAboutSomething(t *testing.T) {
	for _, test := range []struct {
		stack []string // the innermost first
		want  string
	}{
		{[]string{"runtime.mallocgc", "encoding/json.Unmarshal", "sendertrust/cryptohook.(*Hook).receive"}, "JSON"},
		{[]string{"runtime.cgocall", "github.com/mattn/go-sqlite3.(*SQLiteStmt).exec", "database/sql.(*DB).exec"}, "SQLite"},
		{[]string{"crypto/internal/fips140/edwards25519.(*Point).Add", "maunium.net/go/mautrix/crypto/ed25519.Verify"}, "checking signatures"},
		{[]string{"crypto/sha256.block", "maunium.net/go/mautrix/crypto/goolm/session.Decrypt"}, "Olm and Megolm"},
		{[]string{"sendertrust/cryptohook.(*Hook).receive"}, otherKind},
		{[]string{"runtime.scanobject", "runtime.gcBgMarkWorker"}, "garbage collection"},
	} {
		sample := &profile.Sample{}
		for _, name := range test.stack {
			sample.Location = append(sample.Location, &profile.Location{Line: []profile.Line{{Function: &profile.Function{Name: name}}}})
		}
		if got := kindOf(sample); got != test.want {
			t.Errorf("%v is %q, want %q", test.stack, got, test.want)
		}
	}
}
