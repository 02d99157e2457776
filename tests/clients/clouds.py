"""Stand-ins for S3 (moto) and for Google Cloud Storage with its token server, on loopback.

usage: clouds.py DIRECTORY PICTURE: writes DIRECTORY/account.json, prints both ports, and serves
until standard input ends. Bucket `open` is for everyone, bucket `private` wants credentials.
"""

import base64
import json
import pathlib
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from moto.server import ThreadedMotoServer

directory, picture = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes()
key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
TOKEN = "token-of-the-account"
OBJECTS = ["folder/", "folder/a picture.png", "folder/lost.png", "folder/notes.txt", "other.png"]


def decoded(part):
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


class Google(BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        header, claim, signature = form["assertion"][0].split(".")
        signed = f"{header}.{claim}".encode()
        key.public_key().verify(decoded(signature), signed, padding.PKCS1v15(), hashes.SHA256())
        claim = json.loads(decoded(claim))
        assert claim["iss"] == "florence@test" and claim["scope"].endswith("devstorage.read_only")
        self.answer(200, json.dumps({"access_token": TOKEN, "expires_in": 3600}).encode())

    def do_GET(self):
        if self.path.startswith("/computeMetadata/"):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, json.dumps({"access_token": TOKEN, "expires_in": 3600}).encode())
            return
        path, _, query = self.path.partition("?")
        _, _, _, _, bucket, _, *rest = path.split("/")
        name = "/".join(rest)
        is_ours = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if bucket == "private" and not is_ours:
            self.answer(401, b"")
        elif not name:
            self.list(urllib.parse.parse_qs(query))
        elif urllib.parse.unquote(name) == "folder/a picture.png":
            self.answer(200, picture)
        else:
            self.answer(404, b"")

    def list(self, query):
        """Two objects a page."""
        prefix, start = query.get("prefix", [""])[0], int(query.get("pageToken", ["0"])[0])
        found = [name for name in OBJECTS if name.startswith(prefix)]
        page = {"items": [{"name": name} for name in found[start : start + 2]]}
        if start + 2 < len(found):
            page["nextPageToken"] = str(start + 2)
        self.answer(200, json.dumps(page).encode())

    def log_message(self, *_):
        pass


google = ThreadingHTTPServer(("127.0.0.1", 0), Google)
threading.Thread(target=google.serve_forever, daemon=True).start()
google_port = google.server_address[1]
pem = key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.PKCS8,
    serialization.NoEncryption(),
).decode()
account = {
    "client_email": "florence@test",
    "private_key": pem,
    "token_uri": f"http://127.0.0.1:{google_port}/token",
}
(directory / "account.json").write_text(json.dumps(account))

moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
moto.start()
moto_port = moto.get_host_and_port()[1]
s3 = boto3.client(
    "s3",
    endpoint_url=f"http://127.0.0.1:{moto_port}",
    region_name="us-east-1",
    aws_access_key_id="key",
    aws_secret_access_key="secret",
)
s3.create_bucket(Bucket="private")
for name in ["folder/", "folder/notes.txt", "other.png"]:
    s3.put_object(Bucket="private", Key=name, Body=b"")
s3.put_object(Bucket="private", Key="folder/a picture.png", Body=picture)
# More than a page of a listing has.
for i in range(1001):
    s3.put_object(Bucket="private", Key=f"many/{i:04}.png", Body=b"no picture")
print(moto_port, google_port, flush=True)
sys.stdin.read()
