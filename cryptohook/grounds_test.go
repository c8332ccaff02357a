package cryptohook

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.mau.fi/util/dbutil"
	"maunium.net/go/mautrix/id"
)

// weighOneByOne is what a verdict rests on as it is found by a statement for each thing, and what follows from it.
func weighOneByOne(ctx context.Context, h *Hook, sender id.UserID, sessionID id.SessionID) (grounds []ground, v Verdict, awaits bool) {
	for _, claim := range must(h.store.claims(ctx, sessionID)) {
		g := ground{SenderData: claim, identity: must(h.store.identity(ctx, claim.Sender))}
		var err error
		if g.tracked, g.outdated, err = h.store.deviceList(ctx, claim.Sender); err != nil {
			panic(err)
		}
		grounds = append(grounds, g)
	}
	living := livingClaims(claimsOf(grounds))
	var identity *Identity
	for i, claim := range living {
		if i == 0 {
			identity = must(h.store.identity(ctx, claim.Sender))
		}
		if claim.awaitsFirstLook() || h.resolver.pending(claim.Sender) {
			awaits = true
		} else if claim.Sender != "" {
			tracked, outdated, err := h.store.deviceList(ctx, claim.Sender)
			if err != nil {
				panic(err)
			}
			awaits = awaits || outdated || !tracked && !claim.State.proven()
		}
	}
	v = h.anchor().verdict(sender, sessionID, living, identity)
	if err := h.nameSource(ctx, &v); err != nil {
		panic(err)
	}
	return grounds, v, awaits
}

// checkGrounds sees that what verdicts rest on is the same, and gives the same verdict, as one statement and as many, for each session and
// each sender of one.
func (w *trustWorld) checkGrounds() {
	w.t.Helper()
	column := func(query string) []string {
		rows, err := w.db.Query(w.ctx, query)
		return must(dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList())
	}
	senders := append(column("SELECT DISTINCT user_id FROM sendertrust_sender"), "@nobody:test")
	for _, session := range append(column("SELECT DISTINCT session_id FROM sendertrust_claim"), "none") {
		for _, sender := range senders {
			w.checkGroundsOf(id.UserID(sender), id.SessionID(session))
		}
	}
}

func (w *trustWorld) checkGroundsOf(sender id.UserID, sessionID id.SessionID) {
	w.t.Helper()
	for range 10 { // others may be at work
		before, verdictBefore, awaitsBefore := weighOneByOne(w.ctx, w.hook, sender, sessionID)
		all := must(w.hook.store.grounds(w.ctx, sessionID))
		living := livingClaims(all)
		verdict, awaits := must(w.hook.weigh(w.ctx, sender, sessionID, living)), w.hook.awaitsKeys(living)
		after, _, awaitsAfter := weighOneByOne(w.ctx, w.hook, sender, sessionID)
		if !reflect.DeepEqual(before, after) || awaitsBefore != awaitsAfter {
			continue
		}
		if !reflect.DeepEqual(all, before) {
			w.t.Errorf("session %s: in one statement %s, one by one %s", sessionID, rawJSON(all), rawJSON(before))
		}
		if !reflect.DeepEqual(verdict, verdictBefore) || awaits != awaitsBefore {
			w.t.Errorf("session %s: in one statement %+v, awaits keys: %t; one by one %+v, %t", sessionID, verdict, awaits, verdictBefore, awaitsBefore)
		}
		return
	}
	w.t.Error("others do not come to rest")
}

func TestVerdictRestsOnOneStatement(t *testing.T) {
	w := newTrustWorld(t)
	store := w.hook.store
	users := map[id.UserID]*Identity{
		"@nothing:test": nil, "@identity:test": {MasterKey: "I", FirstMasterKey: "I", SelfSigningKey: "S"},
		"@changed:test":  {MasterKey: "C", FirstMasterKey: "B", SelfSigningKey: "S"},
		"@verified:test": {MasterKey: "V", FirstMasterKey: "V", SelfSigningKey: "S", VerifiedBy: w.bot.userSigning.PublicKey(), WasVerified: true, PinnedKey: "V"},
		"@violated:test": {MasterKey: "W", FirstMasterKey: "V", WasVerified: true},
	}
	for userID, identity := range users {
		if identity != nil {
			identity.UserID = userID
			must(0, store.putIdentity(w.ctx, identity, time.UnixMilli(1)))
		}
	}
	lists := map[string]*bool{"untracked": nil, "current": new(bool), "outdated": new(true)}
	put := func(sessionID string, sender id.UserID, senderKey string, state State, masterKey id.Ed25519, change ...func(*SenderData)) {
		sd := &SenderData{
			SessionID: id.SessionID(sessionID), SenderKey: id.SenderKey(senderKey), SigningKey: id.Ed25519("e" + senderKey), RoomID: trustRoom, Sender: sender,
			Source: SourceDirect, State: state, DeviceID: "D", MasterKey: masterKey, ReceivedAt: time.UnixMilli(5), UpdatedAt: time.UnixMilli(7),
		}
		for _, c := range change {
			c(sd)
		}
		must(0, store.putClaim(w.ctx, sd))
	}
	for _, state := range []State{StateUnknownDevice, StateDeviceInfo, StateSenderUnverified, StateSenderVerified, StateVerificationViolation, StateRejected} {
		for userID, identity := range users {
			masterKey := id.Ed25519("gone")
			if identity != nil {
				masterKey = identity.MasterKey
			}
			put(string(state)+" of "+userID.String(), userID, "k", state, masterKey)
		}
		put("nobody's "+string(state), "", "k", state, "", func(sd *SenderData) { sd.Legacy, sd.Source = true, SourceImport })
	}
	put("first look", "@identity:test", "k", StateUnknownDevice, "", func(sd *SenderData) { sd.NextRetry = time.UnixMilli(9) })
	put("second look", "@identity:test", "k", StateDeviceInfo, "", func(sd *SenderData) {
		sd.NextRetry, sd.RetryCount, sd.DeviceKeys = time.UnixMilli(9), 1, rawJSON(object{"a": 1})
	})
	put("from a bundle", "@nothing:test", "k", StateUnknownDevice, "", func(sd *SenderData) { sd.Source = SourceHistoryBundle })
	// Who came first, and at one time the key that is first.
	put("three", "@verified:test", "k3", StateSenderVerified, "V")
	put("three", "@identity:test", "k1", StateSenderUnverified, "I")
	put("three", "@nothing:test", "k2", StateUnknownDevice, "", func(sd *SenderData) { sd.ReceivedAt = time.UnixMilli(4) })
	put("with a forger", "@identity:test", "k2", StateSenderUnverified, "I")
	put("with a forger", "@violated:test", "k1", StateRejected, "")
	put("forgers only", "@identity:test", "k2", StateRejected, "")
	put("forgers only", "@nothing:test", "k1", StateRejected, "")
	put("one key twice", "", "k1", StateUnknownDevice, "")
	put("one key twice", "@changed:test", "k1", StateSenderUnverified, "C", func(sd *SenderData) { sd.ReceivedAt = time.UnixMilli(6) })
	put("unproven second", "@identity:test", "k1", StateSenderUnverified, "I")
	put("unproven second", "@nothing:test", "k2", StateDeviceInfo, "")
	put("verified first", "@verified:test", "k1", StateSenderVerified, "V")
	put("verified first", "@nothing:test", "k2", StateUnknownDevice, "")

	for name, outdated := range lists {
		for userID := range users {
			must(w.db.Exec(w.ctx, "DELETE FROM crypto_tracked_user WHERE user_id=$1", userID))
			if outdated != nil {
				must(w.db.Exec(w.ctx, "INSERT INTO crypto_tracked_user (user_id, devices_outdated) VALUES ($1, $2)", userID, *outdated))
			}
		}
		w.checkGrounds()
		for sessionID, want := range map[id.SessionID]bool{
			"sender_unverified of @identity:test": name == "outdated", "unknown_device of @nothing:test": name != "current",
			"first look": true, "second look": name != "current", "nobody's unknown_device": false, "unproven second": name != "current",
		} {
			if got := w.hook.awaitsKeys(livingClaims(must(store.grounds(w.ctx, sessionID)))); got != want {
				t.Errorf("%s, device list %s: awaits keys: %t, want %t", sessionID, name, got, want)
			}
		}
	}
	three := must(store.grounds(w.ctx, "three"))
	if len(three) != 3 || three[0].SenderKey != "k2" || three[1].SenderKey != "k1" || three[2].SenderKey != "k3" {
		t.Errorf("the order of the claims: %s", rawJSON(three))
	}
	if three[0].identity != nil || *three[1].identity != *users["@identity:test"] || *three[2].identity != *users["@verified:test"] {
		t.Error("the identities are not those of the claims' senders")
	}
	if told, err := w.hook.Review(w.ctx, Verdict{Code: CodeUnverifiedIdentity, SessionID: "sender_verified of @verified:test"}, "@verified:test"); err != nil || told.Code != CodeVerified {
		t.Errorf("reviewed as %s (%v)", told.Code, err)
	}
}

// loggedQuery runs something once, after a query with that text in it was made and before its rows are read.
type loggedQuery struct {
	dbutil.DatabaseLogger
	query string
	then  func()
}

// QueryTiming implements [dbutil.DatabaseLogger].
func (l *loggedQuery) QueryTiming(_ context.Context, _, query string, _ []any, _ int, _ time.Duration, _ error) {
	if then := l.then; then != nil && strings.Contains(query, l.query) {
		l.then = nil
		then()
	}
}

// A key query that ends just after the grounds were read has shown that the sender has another identity.
func TestVerdictKnowsWhatIsLearntWhileItIsMade(t *testing.T) {
	w, alice, _ := twoPeople(t)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	w.handle()
	w.db.Log = &loggedQuery{DatabaseLogger: dbutil.NoopLogger, query: "LEFT JOIN crypto_tracked_user", then: func() {
		err := w.hook.learn(w.ctx, func(ctx context.Context) error {
			changed := *must(w.hook.store.identity(ctx, alice.owner.userID))
			changed.MasterKey, changed.WasVerified = "another", true
			return w.hook.store.putIdentity(ctx, &changed, w.hook.clock())
		})
		if err != nil {
			t.Error(err)
		}
	}}
	told := must(w.hook.Review(w.ctx, Verdict{SessionID: s.id()}, alice.owner.userID))
	if told.Code != CodeVerificationViolation {
		t.Errorf("the verdict is %s", told.Code)
	}
}
