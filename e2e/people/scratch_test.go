package people

import (
	"context"
	"testing"
	"time"
	"fmt"
	"os"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
)

const url = "http://127.0.0.1:18431"

func reg(t *testing.T, name string) string {
	c, _ := mautrix.NewClient(url, "", "")
	name = fmt.Sprintf("%s%d", name, time.Now().UnixNano())
	_, err := c.RegisterDummy(t.Context(), &mautrix.ReqRegister[any]{Username: name, Password: "pw" + name, InhibitLogin: true})
	if err != nil { t.Fatal(err) }
	return name
}

func TestScratch(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var o Options
	if os.Getenv("LOG") != "" {
		l := zerolog.New(zerolog.NewTestWriter(t)); o.Log = &l
	}
	an, bn := reg(t, "alice"), reg(t, "bob")
	alice, err := Login(ctx, url, an, "pw"+an, o)
	if err != nil { t.Fatal(err) }
	defer alice.Close()
	bob, err := Login(ctx, url, bn, "pw"+bn, o)
	if err != nil { t.Fatal(err) }
	defer bob.Close()
	msk, err := alice.BootstrapCrossSigning(ctx)
	t.Log(msk, err)
	msk, err = alice.ResetIdentity(ctx)
	t.Log(msk, err)
	room, err := alice.CreateRoom(ctx, true, bob.UserID)
	t.Log(room, err)
	if err := bob.Join(ctx, room); err != nil { t.Fatal(err) }
	if err := alice.WaitJoined(ctx, room, bob.UserID); err != nil { t.Fatal(err) }
	for i := range 3 {
		ev, err := alice.Send(ctx, room, fmt.Sprint("hi ", i))
		if err != nil { t.Fatal(err) }
		if err := bob.WaitForEvent(ctx, ev); err != nil { t.Fatal(err) }
		s, err := bob.ReadText(ctx, room, ev)
		t.Log(s, err)
		ev, err = bob.Send(ctx, room, fmt.Sprint("ho ", i))
		if err != nil { t.Fatal(err) }
		if err := alice.WaitForEvent(ctx, ev); err != nil { t.Fatal(err) }
		s, err = alice.ReadText(ctx, room, ev)
		t.Log(s, err)
	}
	for _, f := range []Forgery{ForgeSelfSigningSignature(alice.SelfSigningKey()), BreakDeviceSignature(), DeviceKeysOf("@x:localhost"), WrongCurve25519(), WrongEd25519(), OmitDeviceKeys()} {
		ev, s, err := alice.SendWithoutKey(ctx, room, "later")
		if err != nil { t.Fatal(err) }
		if err := alice.ShareKey(ctx, s, bob.UserID, f); err != nil { t.Fatal(err) }
		ev2, err := bob.Send(ctx, room, "x")
		if err := bob.WaitForEvent(ctx, ev2); err != nil { t.Fatal(err) }
		got, err := bob.ReadText(ctx, room, ev)
		t.Log(got, err)
	}
	// junk acceptance
	bd, _ := alice.Devices(ctx, bob.UserID)
	t.Log(bd[0].DeviceID)
	for _, c := range []any{"string", 5, nil, []any{1}, map[string]any{"a": "\xff"}, map[string]any{"org.matrix.msgid": 5}} {
		t.Log(c, alice.SendToDevice(ctx, "m.room.encrypted", bob.UserID, bob.DeviceID, c))
	}
	s, _ := alice.NewSession(room)
	valid, _ := alice.Encrypt(s, "m.room.message", map[string]any{"body": "x", "msgtype": "m.text", "m.relates_to": map[string]any{"m.in_reply_to": map[string]any{"event_id": "$x"}}})
	js, _ := JunkIn(valid)
	t.Log(len(js))
	st := time.Now()
	for _, j := range js {
		if _, err := alice.SendRaw(ctx, room, "m.room.encrypted", j.Content); err != nil { t.Log(j.Name, err) }
	}
	t.Log(time.Since(st))
	st = time.Now()
	p, _ := alice.OlmPayload(bd[0], "m.room_key", s.roomKey())
	js, _ = JunkIn(p)
	t.Log(len(js), time.Since(st))
	fmt.Println(p)
}
