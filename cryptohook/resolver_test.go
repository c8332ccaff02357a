package cryptohook

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"maunium.net/go/mautrix/id"
)

func TestManyUsersAreAskedForInFewRequests(t *testing.T) {
	w := newTrustWorld(t)
	var events []object
	sessions := make(map[*actorDevice]*megolm)
	for i := range 40 {
		device := w.server.add(newActor(id.UserID(fmt.Sprintf("@user%d:test", i)))).addDevice("DEVICE")
		sessions[device] = newMegolm(trustRoom)
		events = append(events, w.share(device, sessions[device], withoutDeviceKeys))
	}
	w.sync(syncPart{toDevice: events})
	w.resolve()
	if count := w.server.count("keys/query"); count != 1 {
		t.Errorf("%d requests", count)
	}
	for device, s := range sessions {
		w.wantState(s, device, StateSenderUnverified)
	}
}

// The schedule, tried out: 12 tries with growing distance, then silence until somebody else learns something.
func TestRetriesEndAfterTwelveAndAKeyQueryLeadsOn(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	for step := 0; step < 40; step++ {
		w.resolve()
		w.clock.advance(2 * time.Hour)
	}
	row := w.row(s, alice)
	if !row.NextRetry.IsZero() || row.State != StateUnknownDevice {
		t.Errorf("stored %+v", row)
	}
	// At once, and twelve times by the schedule.
	if count := w.server.count("keys/query"); count != 13 {
		t.Errorf("asked %d times", count)
	}
	w.know(alice.owner)
	w.wantState(s, alice, StateSenderUnverified)
}

func TestRetryWaitsForItsTime(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.resolve()
	row := w.row(s, alice)
	wait := row.NextRetry.Sub(w.clock.Now())
	if row.RetryCount != 1 || wait < 4*time.Second || wait > 6*time.Second {
		t.Errorf("retry %d in %s", row.RetryCount, wait)
	}
	asked := w.server.count("keys/query")
	w.clock.advance(3 * time.Second)
	w.resolve()
	if w.server.count("keys/query") != asked {
		t.Error("asked before its time")
	}
	w.server.add(alice.owner)
	w.clock.advance(4 * time.Second)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

func TestRetriesSurviveARestart(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.restart()
	w.server.add(alice.owner)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

func TestChangedDeviceListSurvivesARestart(t *testing.T) {
	w, alice, _ := twoPeople(t)
	w.sync(syncPart{changed: []id.UserID{"@alice:test", "@nobody:test"}})
	w.restart()
	alice.owner.reset()
	asked := w.server.count("keys/query")
	if err := w.hook.resolver.begin(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.resolve()
	if w.server.count("keys/query") != asked+1 {
		t.Error("did not ask for the changed list")
	}
	identity := must(w.hook.store.identity(w.ctx, "@alice:test"))
	if identity.MasterKey != alice.owner.masterKey() {
		t.Error("the change was not seen")
	}
	if current := must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")); !current {
		t.Error("the list is still called outdated")
	}
}

func TestFailedQueryKeepsTheListOutdated(t *testing.T) {
	w, _, _ := twoPeople(t)
	w.server.down = true
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	w.resolve()
	if !w.hook.resolver.pending("@alice:test") || must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("a failed query counts as an answer")
	}
	w.server.down = false
	w.clock.advance(time.Minute)
	w.resolve()
	if w.hook.resolver.pending("@alice:test") || !must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("the answer does not count")
	}
}

// slowServer holds a key query up until it is let go.
type slowServer struct {
	http.RoundTripper
	begun, go_ chan struct{}
	once       sync.Once
}

func (s *slowServer) RoundTrip(req *http.Request) (*http.Response, error) {
	if strings.HasSuffix(req.URL.Path, "/keys/query") {
		resp, err := s.RoundTripper.RoundTrip(req)
		s.once.Do(func() {
			close(s.begun)
			<-s.go_
		})
		return resp, err
	}
	return s.RoundTripper.RoundTrip(req)
}

// A list that changes while the query is under way stays outdated: the answer may be older than the change.
func TestListThatChangesDuringTheQueryIsAskedForAgain(t *testing.T) {
	w, alice, _ := twoPeople(t)
	slow := &slowServer{RoundTripper: w.server, begun: make(chan struct{}), go_: make(chan struct{})}
	w.hook.transport.base = slow
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	var pass sync.WaitGroup
	pass.Go(func() {
		if _, err := w.hook.resolver.pass(w.ctx); err != nil {
			t.Error(err)
		}
	})
	<-slow.begun
	alice.owner.reset()
	w.sync(syncPart{changed: []id.UserID{"@alice:test"}})
	close(slow.go_)
	pass.Wait()
	if !w.hook.resolver.pending("@alice:test") || must(w.hook.store.deviceListCurrent(w.ctx, "@alice:test")) {
		t.Error("the older answer counts")
	}
	w.resolve()
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("the change was not seen")
	}
}

func TestGuardsAreReleasedWhenTheWorkFails(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	ctx, cancel := context.WithCancel(w.ctx)
	cancel()
	_, _ = w.hook.resolver.pass(ctx)
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE sendertrust_device RENAME TO gone"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.resolver.pass(w.ctx); err == nil {
		t.Error("no error from a broken database")
	}
	if guard := w.hook.sessions.TryLock(s.id()); guard == nil {
		t.Error("the session stays locked")
	} else {
		guard.Unlock()
	}
	if _, err := w.db.Exec(w.ctx, "ALTER TABLE gone RENAME TO sendertrust_device"); err != nil {
		t.Fatal(err)
	}
	w.server.add(alice.owner)
	w.clock.advance(time.Minute)
	w.resolve()
	w.wantState(s, alice, StateSenderUnverified)
}

// Whoever asks for keys, the answer is used: here it is mautrix, for sending.
func TestEveryKeyQueryReevaluatesItsUsers(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	w.resolve()
	w.server.add(alice.owner)
	if _, err := w.hook.mach.GetOrFetchDevice(w.ctx, "@alice:test", "ALICE"); err != nil {
		t.Fatal(err)
	}
	if worked, err := w.hook.resolver.pass(w.ctx); err != nil || !worked {
		t.Errorf("nothing was done (%v)", err)
	}
	w.wantState(s, alice, StateSenderUnverified)
}

func TestALookThatLearnsNothingIsNoTry(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	alice.crossSigned = false
	w.know(alice.owner)
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s)}})
	before := w.row(s, alice)
	for range 5 {
		w.know(alice.owner)
	}
	if after := w.row(s, alice); after.RetryCount != before.RetryCount || !after.NextRetry.Equal(before.NextRetry) {
		t.Errorf("retry %d at %s became %d at %s", before.RetryCount, before.NextRetry, after.RetryCount, after.NextRetry)
	}
}

func TestUsersThatWereNotAskedForAreIgnored(t *testing.T) {
	w, alice, _ := twoPeople(t)
	eve := newActor("@eve:test")
	eve.addDevice("EVE")
	fake := newActor("@alice:test")
	w.server.forge = func(answer object) {
		answer["device_keys"].(object)["@eve:test"] = object{"EVE": eve.devices[0].keys()}
		answer["master_keys"].(object)["@eve:test"] = eve.masterObject()
		answer["device_keys"].(object)["@alice:test"] = object{}
		answer["master_keys"].(object)["@alice:test"] = fake.masterObject()
	}
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@mallory:test"}, true); err != nil {
		t.Fatal(err)
	}
	if identity := must(w.hook.store.identity(w.ctx, "@eve:test")); identity != nil {
		t.Errorf("stored %+v", identity)
	}
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("another user's answer has changed alice")
	}
}

// A device ID never changes its ed25519 key while it lives, however often the server says so.
func TestADevicesKeyNeverChanges(t *testing.T) {
	w, alice, _ := twoPeople(t)
	genuine := alice.signingKey()
	alice.owner.devices = nil
	changed := alice.owner.addDevice("ALICE")
	for i := range 3 {
		w.know(alice.owner)
		if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key == changed.signingKey() {
			t.Fatalf("the new key %s was taken for %s at query %d", key, genuine, i+1)
		}
	}
}

func TestADeviceIDMayBeUsedAgainAfterItsDeletion(t *testing.T) {
	w, alice, _ := twoPeople(t)
	alice.owner.devices = nil
	w.know(alice.owner)
	again := alice.owner.addDevice("ALICE")
	w.know(alice.owner)
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != again.signingKey() {
		t.Errorf("the key is %q", key)
	}
}

func TestForgedDevicesAreNotStored(t *testing.T) {
	w, alice, mallory := twoPeople(t)
	w.server.forge = func(answer object) {
		devices := answer["device_keys"].(object)["@alice:test"].(object)
		devices["EXTRA"] = mallory.keys()
		unsigned := alice.selfSignedKeys()
		unsigned["device_id"] = "UNSIGNED"
		devices["UNSIGNED"] = unsigned
		devices["JUNK"] = 5
	}
	// mautrix cannot read the answer as a whole, with junk in it; what is good in it is not to be lost, nor what is bad to be kept.
	_, _ = w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true)
	for _, deviceID := range []id.DeviceID{"EXTRA", "UNSIGNED", "JUNK"} {
		if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", deviceID)); key != "" {
			t.Errorf("%s was stored", deviceID)
		}
	}
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != alice.signingKey() {
		t.Error("the genuine device is gone")
	}
}

// An answer without a user's keys (a server that cannot be reached) says nothing about that user.
func TestMissingAnswerChangesNothing(t *testing.T) {
	w, alice, _ := twoPeople(t)
	delete(w.server.actors, "@alice:test")
	_, _ = w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true)
	if key := must(w.hook.store.signingKey(w.ctx, "@alice:test", "ALICE")); key != alice.signingKey() {
		t.Error("the device is gone")
	}
	alice.owner.hidden = true
	w.know(alice.owner)
	if identity := must(w.hook.store.identity(w.ctx, "@alice:test")); identity.MasterKey != alice.owner.masterKey() {
		t.Error("the identity is gone")
	}
}

func TestPinIsSignedOnceAndOnlyTheRightKey(t *testing.T) {
	alice, bob := newActor("@alice:test"), newActor("@bob:test")
	w := newTrustWorld(t, func(o *Options) {
		o.VerifiedUsers = map[id.UserID]id.Ed25519{"@alice:test": alice.masterKey(), "@bob:test": alice.masterKey()}
	})
	w.server.add(alice)
	w.server.add(bob)
	for range 3 {
		if err := w.hook.resolver.begin(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.resolve()
	}
	if count := w.server.count("keys/signatures/upload"); count != 1 {
		t.Errorf("signed %d times", count)
	}
	if standing := w.hook.anchor().judge(must(w.hook.store.identity(w.ctx, "@alice:test"))); standing != standingVerified {
		t.Errorf("alice's standing is %d", standing)
	}
	if standing := w.hook.anchor().judge(must(w.hook.store.identity(w.ctx, "@bob:test"))); standing != standingViolation {
		t.Errorf("bob's standing is %d", standing)
	}
	if !strings.Contains(w.log.String(), "NOT the one that the configuration pins") {
		t.Error("the log does not say that bob's pin does not fit")
	}
}

func TestResolverRunsAndEndsWithItsContext(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test")).addDevice("ALICE")
	ctx, cancel := context.WithCancel(w.ctx)
	var resolver sync.WaitGroup
	resolver.Go(func() { w.hook.resolver.run(ctx) })
	defer resolver.Wait()
	defer cancel()
	s := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, s, withoutDeviceKeys)}})
	for w.row(s, alice).State == StateUnknownDevice {
		if w.ctx.Err() != nil {
			t.Fatal("never resolved")
		}
	}
	w.wantState(s, alice, StateSenderUnverified)
}
