package cryptohook

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/id"
)

// signedKeys gives the signatures that mautrix has stored.
func (w *trustWorld) signedKeys() []string {
	w.t.Helper()
	return scanStrings(w.db.RawDB, `
		SELECT signed_user_id || ' ' || signed_key || ' ' || signer_user_id || ' ' || signer_key || ' ' || signature
		FROM crypto_cross_signing_signatures ORDER BY 1
	`)
}

// unheld has mautrix store as it does without us.
type unheld struct{ *unitOfWork }

func (u unheld) PutSignature(ctx context.Context, signedUserID id.UserID, signedKey id.Ed25519, signerUserID id.UserID, signerKey id.Ed25519, signature string) error {
	return u.SQLCryptoStore.PutSignature(ctx, signedUserID, signedKey, signerUserID, signerKey, signature)
}

// The number of statements pins what signsDevices is called: without it each signature would be written by its own.
func TestSignaturesOnDevicesAreWrittenWithTheDevices(t *testing.T) {
	const devices = 7
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test"))
	for i := range devices {
		alice.addDevice(id.DeviceID(fmt.Sprint("DEVICE", i)))
	}
	fetch := func() {
		t.Helper()
		if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
			t.Fatal(err)
		}
	}
	count := w.statements("INSERT INTO crypto_cross_signing_signatures")
	fetch()
	together := w.signedKeys()
	if got := count.count.Load(); got > 6 {
		t.Errorf("%d statements for two signatures on each of %d devices, and one on a key", got, devices)
	}
	w.nothingHeld()
	if _, err := w.db.Exec(w.ctx, "DELETE FROM crypto_cross_signing_signatures WHERE signed_user_id='@alice:test'"); err != nil {
		t.Fatal(err)
	}
	w.hook.mach.CryptoStore = unheld{w.hook.uow}
	fetch()
	if apart := w.signedKeys(); strings.Join(apart, "\n") != strings.Join(together, "\n") {
		t.Errorf("stored are\n%s\nand without us\n%s", strings.Join(together, "\n"), strings.Join(apart, "\n"))
	}
}

func (w *trustWorld) nothingHeld() {
	w.t.Helper()
	w.hook.uow.held.mu.Lock()
	defer w.hook.uow.held.mu.Unlock()
	if held := w.hook.uow.held.ofUser; len(held) > 0 {
		w.t.Errorf("these wait for nothing: %v", held)
	}
}

// Whatever a server answers, what mautrix has held back is written when FetchKeys returns.
func TestNoOddAnswerLeavesSignaturesHeldBack(t *testing.T) {
	w := newTrustWorld(t)
	s := newStrangeServer(1, w.bot)
	w.hook.transport.base = s.server
	for range 20 {
		asked, said := s.answer()
		s.server.forge = func(answer object) {
			clear(answer)
			for field, value := range said {
				answer[field] = value
			}
		}
		s.server.requests = make(map[string]int)
		users := make([]id.UserID, 0, len(asked.DeviceKeys))
		for userID := range asked.DeviceKeys {
			users = append(users, userID)
		}
		if _, err := w.hook.mach.FetchKeys(w.ctx, users, true); err != nil {
			t.Fatal(err)
		}
		w.nothingHeld()
	}
	if len(w.signedKeys()) < 30 {
		t.Errorf("there are only %d signatures", len(w.signedKeys()))
	}
}

// Who signs something and is told that it is stored may rely on it.
func TestSignatureThatNoKeyQueryBringsIsWrittenAtOnce(t *testing.T) {
	w, alice, _ := twoPeople(t)
	before := len(w.signedKeys())
	if err := w.hook.mach.CryptoStore.PutSignature(w.ctx, "@alice:test", alice.signingKey(), "@bot:test", "signer", "signature"); err != nil {
		t.Fatal(err)
	}
	if after := len(w.signedKeys()); after != before+1 {
		t.Errorf("there are %d signatures, and were %d before", after, before)
	}
	w.nothingHeld()
}

// One that cannot be stored keeps the others and the devices from nothing, as without us.
func TestSignatureThatCannotBeStoredHoldsUpNoDevice(t *testing.T) {
	w := newTrustWorld(t)
	alice := w.server.add(newActor("@alice:test"))
	first, second := alice.addDevice("FIRST"), alice.addDevice("SECOND")
	// mautrix keeps what anybody is said to have signed with the device's own key. No index takes a name of that length, in PostgreSQL.
	long := make([]byte, 40_000)
	for i := range long {
		long[i] = 'a' + byte(rand.UintN(26))
	}
	w.server.forge = func(answer object) {
		keys := answer["device_keys"].(object)["@alice:test"].(object)["FIRST"].(object)
		keys["signatures"].(object)["@"+string(long)+":test"] = object{"ed25519:FIRST": forgedSignature()}
	}
	if !onPostgres {
		_, err := w.db.Exec(w.ctx, `
			CREATE TRIGGER forbidden BEFORE INSERT ON crypto_cross_signing_signatures WHEN LENGTH(NEW.signer_user_id)>1000
			BEGIN SELECT RAISE(ABORT, 'forbidden'); END
		`)
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
		t.Fatal(err)
	}
	devices := must(w.hook.mach.CryptoStore.GetDevices(w.ctx, "@alice:test"))
	if len(devices) != 2 {
		t.Fatalf("stored are %v", devices)
	}
	for _, device := range []*actorDevice{first, second} {
		for _, signer := range []id.Ed25519{device.signingKey(), alice.selfSigningKey()} {
			if !must(w.hook.mach.CryptoStore.IsKeySignedBy(w.ctx, "@alice:test", device.signingKey(), "@alice:test", signer)) {
				t.Errorf("the signature of %s on %s is not stored", signer, device.deviceID)
			}
		}
	}
	w.nothingHeld()
}

// Devices that cannot be stored are as good as not seen: mautrix asks for them again. Their signatures are not kept in memory for that.
func TestDevicesThatCannotBeStoredLeaveNoSignaturesBehind(t *testing.T) {
	sqliteOnly(t)
	w := newTrustWorld(t)
	w.server.add(newActor("@alice:test")).addDevice("ALICE")
	if _, err := w.db.Exec(w.ctx, "CREATE TRIGGER forbidden BEFORE INSERT ON crypto_device BEGIN SELECT RAISE(ABORT, 'forbidden'); END"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.hook.mach.FetchKeys(w.ctx, []id.UserID{"@alice:test"}, true); err != nil {
		t.Fatal(err)
	}
	w.nothingHeld()
	if tracked := must(w.hook.mach.CryptoStore.FilterTrackedUsers(w.ctx, []id.UserID{"@alice:test"})); len(tracked) > 0 {
		t.Error("the devices count as stored")
	}
}

var _ crypto.Store = unheld{}
