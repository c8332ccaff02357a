package bot

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

func auditTable(t *testing.T) *records {
	t.Helper()
	db, err := dbutil.NewWithDialect("file:"+filepath.Join(t.TempDir(), "bot.db"), "sqlite3-fk-wal")
	return newRecords(upgraded(t, db, err), nil, dbutil.NoopLogger)
}

// lineAt is a line with the number as its event and its time.
func lineAt(number int, outcome string) *auditLine {
	return &auditLine{
		eventID: id.EventID(fmt.Sprintf("$%d", number)), at: time.UnixMilli(int64(number)), roomID: "!room:x", sender: "@olga:x", deviceID: "DEVICE",
		masterKey: "key", code: cryptohook.CodeVerified, command: "verify", arguments: "@bob:x", outcome: outcome,
	}
}

func TestAuditLineThatWasBegunGetsItsOutcome(t *testing.T) {
	table := auditTable(t)
	begun, again := lineAt(1, auditBegun), lineAt(1, auditDone)
	again.at, again.detail = time.UnixMilli(99), "detail"
	late := lineAt(1, string(outcomeRefused)) // after a crash
	for _, line := range []*auditLine{begun, again, late, lineAt(2, string(outcomeRefused))} {
		if err := table.putAudit(t.Context(), line); err != nil {
			t.Fatal(err)
		}
	}
	lines, err := table.lastAudits(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	want := *lineAt(1, auditDone)
	want.detail = "detail"
	if len(lines) != 2 || lines[0] != *lineAt(2, string(outcomeRefused)) || lines[1] != want {
		t.Errorf("got %+v", lines)
	}
	if of, err := table.auditOf(t.Context(), "$1"); err != nil || of == nil || *of != want {
		t.Errorf("the line of $1 is %+v, %v", of, err)
	}
	if of, err := table.auditOf(t.Context(), "$3"); err != nil || of != nil {
		t.Errorf("the line of nothing is %+v, %v", of, err)
	}
	if newest, err := table.lastAudits(t.Context(), 1); err != nil || len(newest) != 1 || newest[0].eventID != "$2" {
		t.Errorf("the newest is %+v, %v", newest, err)
	}
}

// Anybody may be refused as often as they like; what operators did is kept.
func TestOldRefusalsAreDroppedAndNothingElse(t *testing.T) {
	table := auditTable(t)
	for i := range 20 {
		outcome := string(outcomeRefused)
		if i < 2 {
			outcome = auditDone
		}
		if err := table.putAudit(t.Context(), lineAt(i+1, outcome)); err != nil {
			t.Fatal(err)
		}
	}
	if err := table.exec(t.Context(), pruneAuditQuery, 4); err != nil {
		t.Fatal(err)
	}
	lines, err := table.lastAudits(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	var kept string
	for _, line := range lines {
		kept += string(line.eventID)
	}
	if kept != "$20$19$18$17$16$2$1" {
		t.Errorf("kept %s", kept)
	}
}

// A homeserver may put an event of anybody into any room.
func TestOperatorHasToBeAMemberOfTheRoom(t *testing.T) {
	store := mautrix.NewMemoryStateStore()
	b := &Bot{client: &mautrix.Client{StateStore: store}}
	for membership, want := range map[event.Membership]bool{
		"": false, event.MembershipInvite: false, event.MembershipLeave: false, event.MembershipBan: false, event.MembershipJoin: true,
	} {
		roomID := id.RoomID("!" + string(membership) + ":x")
		if membership != "" {
			if err := store.SetMembership(t.Context(), roomID, "@olga:x", membership); err != nil {
				t.Fatal(err)
			}
		}
		if got := b.isMember(t.Context(), roomID, "@olga:x"); got != want {
			t.Errorf("who has %q is a member: %v", membership, got)
		}
	}
}
